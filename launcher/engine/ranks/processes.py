"""Processes: ties that keep any from outliving its parent, and the memory and cores they use."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from pathlib import Path

import psutil
import torch

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process as soon as its parent has ended, however it ends (Linux).

    The kernel watches the thread of the parent that started this process, not the whole parent.

    Args:
        parent: Process id of the parent. If it has ended already, this process kills itself.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before prctl took effect
        os.kill(os.getpid(), signal.SIGKILL)


def children() -> list[int]:
    """Return the ids of the child processes of this process."""
    return [child.pid for child in psutil.Process().children()]


def run_delay() -> float:
    """Return the seconds that this thread has waited for a core; 0 if the kernel does not count."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def private_bytes(pid: int) -> int:
    """Return the bytes of memory that a process shares with no other; 0 if they cannot be read."""
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process in bytes, on its GPU or on the host."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_reserved(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
