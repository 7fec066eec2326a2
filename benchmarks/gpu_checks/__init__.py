"""The checks of gpu.py.

machine     the devices, and how checks run commands of launcher on them
exactness   equal steps on every number of GPUs, and over gloo
device      times, waits, contexts and memory of a GPU
failures    killed, hanging and stopped ranks, and resumption
speed       throughput, against other settings and other loops
probes      measurements in a process of their own, which imports torch
loops       one training in launcher's loop and in others, in a process of its own
here        training with launcher in this process
"""
