"""What this process was given: the machine, its place among the ranks, nodes and Slurm steps."""
