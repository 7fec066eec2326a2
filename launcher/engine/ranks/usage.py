"""The memory and the utilisation of a rank at this moment, for its heartbeat."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import psutil
import torch

from launcher.engine.ranks.current_device import make_current


def usage_of(device: torch.device) -> Callable[[], dict[str, Any]]:
    """Return a function that measures memory and utilisation, as fields of `Heartbeat`.

    On a GPU both are those of the device, whichever processes use it; without NVIDIA's management
    library the utilisation is missing. On a CPU both are those of this process, the utilisation
    relative to one core.
    """
    if device.type != "cpu":
        return LastMeasurement(lambda: _gpu_usage(device))
    process = psutil.Process()

    def process_usage() -> dict[str, Any]:
        return {
            "memory_bytes": process.memory_info().rss,
            "utilisation": process.cpu_percent() / 100,
        }

    return process_usage


class LastMeasurement:
    """A function that returns its last result at once, and measures again in a thread of its own.

    A call of a driver may never return. The watchdog, which calls this, must go on.

    Args:
        measure: The function that measures. Its errors are ignored.
    """

    def __init__(self, measure: Callable[[], dict[str, Any]]) -> None:
        self._measure = measure
        self._values: dict[str, Any] = {}
        self._is_wanted = threading.Event()
        threading.Thread(target=self._work, name="usage", daemon=True).start()

    def __call__(self) -> dict[str, Any]:
        self._is_wanted.set()
        return self._values

    def _work(self) -> None:
        while self._is_wanted.wait():
            self._is_wanted.clear()
            with contextlib.suppress(Exception):  # the driver may raise anything
                self._values = self._measure()


def _gpu_usage(device: torch.device) -> dict[str, Any]:
    make_current(device)
    gpu = torch.get_device_module(device)
    free, total = gpu.mem_get_info(device)
    values: dict[str, Any] = {"memory_bytes": total - free, "memory_total_bytes": total}
    with contextlib.suppress(Exception):  # the library is missing, or raises an error of its own
        values["utilisation"] = gpu.utilization(device) / 100
    return values
