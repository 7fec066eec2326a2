"""What all schedulers share; this room imports no torch.

`scheduler` is the interface that Slurm, Kubernetes, ssh and SkyPilot implement, and the table that
finds them by name. `request` is what a user asks for, and `hardware` plans it for the nodes of a
cluster. `site_profile` reads profiles. `prepared` is a planned job, and submits it without leaving
anything half done; `job_code` copies the code that it imports, and `project_paths` names files
where there is a copy. `submission` is the record of a submitted run, `run_states` asks the
schedulers for the states of runs, `status_table` shows several, and `follow` waits for the end of a
run.
"""
