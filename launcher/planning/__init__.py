"""Planning: from a recipe and an environment to every number of a run, before any GPU is used.

`planner.make_plan` returns a `plan.Plan`. `global_batch` divides a batch among ranks and
micro-batches, `stages` describes batches that grow, `loading` decides on DataLoader workers, and
`strategy` lists the ways to shard a model. `derivations` writes the arithmetic for readers,
`single_sample_batches` finds micro-batches that BatchNorm cannot use, `weight_headers` reads what
files of weights hold, and `configs` writes a plan as files for Accelerate and DeepSpeed. `memory`
computes the memory of a rank from `memory_facts`.
"""
