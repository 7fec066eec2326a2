"""Warm starts: commands that are forked from a server, which has imported torch before."""
