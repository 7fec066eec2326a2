"""From a plan to processes.

`prepare` turns a request into a planned run; `session` starts it and returns its result. `launcher`
runs the ranks of one machine with PyTorch's elastic agent; `signal_handler` stops them.
`run_folder` makes the folder of a run; `typed_recipe` keeps there a recipe that is in no file.
`only_launcher` refuses to start ranks in each process of torchrun. `examination` runs one process
that examines a recipe. `evaluate_run` and `predict_run` start ranks that compute with the weights
of a run. `multi_node` connects the launchers of several nodes; `ssh` starts launchers on other
hosts through `ssh_sessions`, where `ssh_remote` receives signals for them.
"""
