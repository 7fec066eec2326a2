"""From a recipe and an environment to every number of a run, before any GPU is asked for."""
