"""A stand-in for the module `pynvml`, whose functions answer from a table."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """What every function of the library raises where the driver does not support it."""


HEALTHY: Mapping[str, Any] = {
    "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
    "nvmlDeviceGetUUID": "GPU-0a1b2c3d-0000-0000-0000-000000000000",
    "nvmlDeviceGetPciInfo": SimpleNamespace(busId="00000000:3B:00.0"),
    "nvmlDeviceGetRemappedRows": (0, 0, 0, 0),
    "nvmlDeviceGetTotalEccErrors": 0,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x1,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
    "nvmlDeviceGetPersistenceMode": 1,
    "nvmlDeviceGetPerformanceState": 0,
    "nvmlDeviceGetCurrPcieLinkWidth": 16,
    "nvmlDeviceGetMaxPcieLinkWidth": 16,
    "nvmlDeviceGetCurrPcieLinkGeneration": 5,
    "nvmlDeviceGetMaxPcieLinkGeneration": 5,
    "nvmlDeviceGetNvLinkState": [1] * 18,
    "nvmlDeviceGetComputeRunningProcesses": [],
}
"""The answers of a healthy GPU of this kind; it has no page retirement."""


class FakeNvml:
    """The functions of `pynvml` that launcher calls.

    Args:
        gpus: The answers of each GPU by function. A function that is missing, or whose answer is
            an exception, raises; a list for links answers by link.
        error: What `nvmlInit` raises, if anything.
    """

    def __init__(self, *gpus: Mapping[str, Any], error: Exception | None = None) -> None:
        self._gpus, self._error = gpus, error

    def nvmlInit(self) -> None:  # noqa: N802
        if self._error is not None:
            raise self._error

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Mapping[str, Any]:  # noqa: N802
        if isinstance(lost := self._gpus[index].get("lost"), Exception):
            raise lost
        return self._gpus[index]

    def __getattr__(self, name: str) -> Any:
        def answer(handle: Mapping[str, Any], *arguments: int) -> Any:
            value = handle.get(name, NVMLError("Not Supported"))
            if name == "nvmlDeviceGetNvLinkState" and isinstance(value, list):
                link = arguments[0]
                value = value[link] if link < len(value) else NVMLError("Invalid Argument")
            if isinstance(value, Exception):
                raise value
            return value

        return answer
