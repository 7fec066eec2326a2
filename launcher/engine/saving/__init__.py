"""The files of checkpoints and of the final weights."""
