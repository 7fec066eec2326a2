"""Slurm jobs; this room imports no torch.

`site` reads site profiles. `batch_job` plans a job, `resources` works out what it asks for,
`job_code` copies its code, and `script` renders the batch script. `queue` calls Slurm's commands;
`submitting` checks and submits a script. `submission` is the record of a submitted run and its
status, `status_table` shows several, and `follow` waits for the end of a run.
"""
