"""Slurm: what it says of a process, what is asked of it, what it says of jobs. Without torch."""
