"""Slurm: batch scripts, the queue, and what was submitted. No torch."""
