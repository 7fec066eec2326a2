"""Short measured trainings that find the settings of a recipe, and estimates from measurements.

- `probe_run`: a recipe with overrides as the target of a measurement, and running it as a probe.
- `lr_search`, `batch_search`, `noise_search`, `loader_search`, `strategy_search`: one
  `launcher find` command each.
- `tune`: all searches in sequence, each with the settings that the earlier ones found, for
  `launcher tune`; `tuning_folder` stores their results, and `tuning_result` combines them.
- `profile_run` and `profile_table`: `launcher profile`.
- `memory_plan`: the memory of a rank under each strategy, for `launcher plan --memory`.
- `memory_trial`: a trial of settings that may exceed the memory.
- `measurements`, `estimate` and `estimate_table`: `launcher plan --estimate`.
- `summaries`: texts and plots of the results of the searches.

The probes run in `launcher.engine`; the mathematics is in `launcher.analysis`.
"""
