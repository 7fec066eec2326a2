"""What a rank uses right now, for whoever watches it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import psutil
import torch


def usage_of(device: torch.device) -> Callable[[], dict[str, Any]]:
    """Return a function that returns what `Health` says of memory and utilisation.

    On a GPU they are the device's, whoever uses it; the utilisation takes NVIDIA's library, and is
    left out without it. On CPUs they are this process's, of one core.
    """
    if device.type == "cuda":
        return lambda: _of_gpu(device)
    process = psutil.Process()

    def of_process() -> dict[str, Any]:
        return {
            "memory_bytes": process.memory_info().rss,
            "utilisation": process.cpu_percent() / 100,
        }

    return of_process


def _of_gpu(device: torch.device) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(device)
    found: dict[str, Any] = {"memory_bytes": total - free, "memory_total_bytes": total}
    with contextlib.suppress(Exception):  # without NVIDIA's library, or what it raises itself
        found["utilisation"] = torch.cuda.utilization(device) / 100
    return found
