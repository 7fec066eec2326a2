"""Slurm jobs; this room imports no torch.

`site` reads site profiles, and `partitions` what Slurm knows of its nodes. `batch_job` plans a job,
`resources` works out what it asks for, and `script` renders the batch script. `queue` calls Slurm's
commands, `job_states` reads the states of jobs from them, `job_status` is the state of a run by its
job, and `slurm_scheduler` puts them together.
"""
