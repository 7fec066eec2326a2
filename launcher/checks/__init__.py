"""Checks that run before training: `launcher check`, `doctor` and `prove`."""
