"""Sweeps: one recipe trained with every combination of some settings, on this machine.

    sweep_request   what is asked, checked and planned before anything starts
    sweep_record    sweep.json: what was asked, what was chosen, what each run came to
    shares          the GPUs, or the cores, of each run that trains at the same time
    trial_process   one run of a sweep, in a process of its own
    sweeper         starts the runs, chooses which go on, handles signals
    sweep_result    what the runs came to, read from their folders
    sweep_table     the same as a table
    search_objective  one run as a function that returns a metric, for Optuna and the like

`launcher sweep` and `launcher.sweep` are thin layers over this room.
"""
