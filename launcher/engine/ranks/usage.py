"""The memory and the utilisation of a rank at this moment, for its heartbeat."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import psutil
import torch


def usage_of(device: torch.device) -> Callable[[], dict[str, Any]]:
    """Return a function that measures memory and utilisation, as fields of `Heartbeat`.

    On a GPU both are those of the device, whichever processes use it; without NVIDIA's management
    library the utilisation is missing. On a CPU both are those of this process, the utilisation
    relative to one core.
    """
    if device.type == "cuda":
        return lambda: _gpu_usage(device)
    process = psutil.Process()

    def process_usage() -> dict[str, Any]:
        return {
            "memory_bytes": process.memory_info().rss,
            "utilisation": process.cpu_percent() / 100,
        }

    return process_usage


def _gpu_usage(device: torch.device) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(device)
    values: dict[str, Any] = {"memory_bytes": total - free, "memory_total_bytes": total}
    with contextlib.suppress(Exception):  # the library is missing, or raises an error of its own
        values["utilisation"] = torch.cuda.utilization(device) / 100
    return values
