"""Models and statistics of measurements, in pure Python.

- `lr_curve`: where the loss of a learning-rate range test is lowest, and where it diverges.
- `lr_trials`: the search for a learning rate by short trainings, and how often it is right.
- `batch_sizes`: the micro-batch sizes to try, and the one to choose from those measured.
- `gradient_noise`: the gradient noise scale, and what it says about the global batch size.
- `loader_throughput`: the number of DataLoader workers that a data set needs.
- `step_profile`: the parts of a step in a trace of torch.profiler, with advice.
- `slow_ranks`: ranks that the others wait for, while a run trains.
- `time_shares`: the parts of a step in the metrics of a run, stragglers, utilisation.
- `scaling_model`: the time of a step on more ranks and nodes, and the cost of failures.
- `device_peaks`: the peak arithmetic throughput of GPUs.

Nothing here measures or imports torch: the probes of `launcher.engine` measure, and
`launcher.tuning` combines both.
"""
