"""Checks that run before training.

- `check`: `launcher check` builds what a recipe describes and takes a few samples through it.
- `doctor`: `launcher doctor` starts ranks that examine their node, their device and each other.
- `node_checks`: findings about one node, such as cores, memory and disk.
- `health_checks`: findings about the health of a node's GPUs and InfiniBand adapters.
- `group_checks`: findings about a group of ranks, such as versions and all-reduce.
- `proof`: `launcher prove`, from the recipe to the rows and the cause of a difference.
- `prove`: runs a recipe on several numbers of ranks and compares the steps.
- `proof_summary`: the table of `launcher prove`, its verdict and the causes of differences.
"""
