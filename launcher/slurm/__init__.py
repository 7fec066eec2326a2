"""Slurm jobs; this room imports no torch.

`site` reads site profiles. `batch_job` plans a job, `resources` works out what it asks for, and
`script` renders the batch script. `queue` calls Slurm's commands, `job_status` is the state of a
run by its job, and `slurm_scheduler` puts them together.
"""
