"""Processes: ties that keep any from outliving its parent, and the memory and cores they use."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
from pathlib import Path

import psutil
import torch

from launcher.engine.ranks.freed_memory import return_freed_memory

_PR_SET_PDEATHSIG = 1
_RESET_PEAK = "5"
"""What resets the peak of resident memory in /proc/self/clear_refs (proc(5))."""


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


class StepMemory:
    """The peak memory of this process from some moment on.

    On a CPU it is resident memory beyond that at the call of `start`, and freed memory is returned
    to the system at once, so that it is what tensors need.

    Args:
        device: The device of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = 0
        if device.type == "cpu":
            return_freed_memory()

    def start(self) -> None:
        """Take what is resident now as what the process needs without its model, and reset."""
        self.reset()
        if self._device.type == "cpu":
            self._baseline = _resident_bytes("VmRSS")

    def reset(self) -> None:
        """Let the peak start with what is in use now."""
        if self._device.type != "cpu":
            torch.get_device_module(self._device).reset_peak_memory_stats(self._device)
        else:
            with contextlib.suppress(OSError):  # without it the peak is that of the whole process
                Path("/proc/self/clear_refs").write_text(_RESET_PEAK)

    def peak(self) -> int:
        """Return the most bytes in use since `reset`: of tensors on a GPU, or resident on a CPU."""
        if self._device.type != "cpu":
            return int(torch.get_device_module(self._device).max_memory_allocated(self._device))
        return max(_resident_bytes("VmHWM") - self._baseline, 0)


def _resident_bytes(name: str) -> int:
    """Return resident memory of this process: `VmRSS` now, or `VmHWM` at most."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
