"""Runs on hosts that ssh reaches, started in the background; this room imports no torch."""
