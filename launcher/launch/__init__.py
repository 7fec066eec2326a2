"""From a plan to processes: on this machine, and over ssh on several."""
