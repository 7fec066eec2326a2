"""What this process was given: its machine, its place among the ranks, and the nodes of the run.

`machine` reads cores, GPUs and memory. `world` reads this process's rank from the environment, and
`nodes` which nodes take part in a run. `slurm_step` reads the variables of a Slurm job step,
`accelerate_launch` the settings that `accelerate launch` passes on. `gpu_health`, `kernel_log` and
`infiniband` read what `launcher doctor` judges, and `within_time` limits how long a driver may take
to answer. `program` returns the command that starts this launcher in another process.
"""
