"""The processes of a run: how ranks start, meet, report failures, print, and end together.

agent             PyTorch's elastic agent, which forks or spawns the ranks of this node
rendezvous        the launchers of several nodes: they meet, agree, and notice each other's end
meeting           the launchers of a run that restarts; held_meeting, round_host: its host's part
launcher_store    the store at which launchers meet, and its calls, which end
store_process     the process that serves it
external_store    the store at which ranks meet that torchrun or srun started
turns             ranks of a node that take turns, or wait for all, without a timeout
freed_memory      keeps freed memory for the next tensors
watchdog          the heartbeat of a rank, and the end of a run that hangs
failures          what a rank does when it fails
output            where the output of a rank goes: its log, and the terminal for rank 0
cpu_binding       binds a rank to the CPUs of its GPU's NUMA node
processes, usage  ties between processes, and the memory and cores that they use
"""
