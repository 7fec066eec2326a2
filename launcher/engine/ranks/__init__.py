"""Processes of a run: the agent, rendezvous, watchdog, failures and output of each rank."""
