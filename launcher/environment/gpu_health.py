"""What NVIDIA's management library (NVML) says about the health of each GPU.

A driver may support any part of this or none, so every value may be missing. `launcher.checks`
judges the values.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLOCK_LIMITS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
"""Reasons for which a GPU lowers its clocks, by their bits in `nvmlClocksEventReason*`."""

_UNCORRECTED, _VOLATILE = 1, 0
"""`NVML_MEMORY_ERROR_TYPE_UNCORRECTED` and `NVML_VOLATILE_ECC`."""

_MAX_LINKS = 36
"""Upper limit on the NVLinks of a GPU: `NVML_NVLINK_MAX_LINKS` of NVML 13."""


@dataclass(frozen=True, kw_only=True)
class GpuProcess:
    """A process that computes on a GPU."""

    pid: int
    name: str | None
    """Name of the program; None if it runs in another container."""

    memory_bytes: int | None
    """Its memory on the GPU."""


@dataclass(frozen=True, kw_only=True)
class GpuHealth:
    """The state of one GPU. None stands for a value that the driver does not tell."""

    index: int
    """Index of the GPU in the order of `nvidia-smi`."""

    error: str | None = None
    """Why the GPU cannot be asked for anything, such as `GPU is lost`."""

    name: str | None = None
    uuid: str | None = None
    pci_address: str | None = None
    """Address on the PCI bus, as in /sys/bus/pci/devices: `0000:3b:00.0`."""

    uncorrected_errors: int | None = None
    """Memory errors since the driver was loaded that ECC could not correct."""

    has_pending_repair: bool | None = None
    """Whether rows wait to be remapped, or pages to be retired, at the next reset."""

    has_failed_repair: bool | None = None
    """Whether a row could not be remapped because no spare row is left."""

    clock_limits: tuple[str, ...] | None = None
    """Why the clocks are lowered at this moment: values of `CLOCK_LIMITS`."""

    power_limit_watts: float | None = None
    default_power_limit_watts: float | None = None
    is_persistent: bool | None = None
    """Whether the driver stays loaded while no process uses the GPU."""

    performance_state: int | None = None
    """From 0, for the highest clocks, to 15; an idle GPU may be in any."""

    pcie_width: int | None = None
    """Lanes of PCIe in use."""

    max_pcie_width: int | None = None
    """Lanes of PCIe that the GPU and its slot can use."""

    pcie_generation: int | None = None
    """Generation of PCIe in use, which is lower while the GPU is idle."""

    max_pcie_generation: int | None = None
    """Generation of PCIe that the GPU and its slot can use."""

    nvlinks: tuple[bool, ...] = ()
    """Whether each NVLink is active, by number; empty without NVLink."""

    processes: tuple[GpuProcess, ...] | None = None
    """The processes that compute on it, without those that the caller asked to leave out."""


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """The health of the GPUs that this process may use."""

    gpus: tuple[GpuHealth, ...] = ()
    hidden: tuple[str, ...] = ()
    """Addresses on the PCI bus of GPUs that CUDA_VISIBLE_DEVICES hides from this process."""

    error: str | None = None
    """Why the library cannot be asked; None if it can."""


def read_gpus(
    *,
    nvml: Any = None,
    env: Mapping[str, str] | None = None,
    root: Path = Path("/"),
    without_children_of: int | None = None,
) -> GpuReport:
    """Return the health of the GPUs that this process may use.

    A driver that is in trouble may not answer: call this within a limit of time.

    Args:
        nvml: The module `pynvml`, or one with its functions; None imports it.
        env: The environment, whose CUDA_VISIBLE_DEVICES hides GPUs; None reads this process's.
        root: Root of the files of /proc that are read.
        without_children_of: Id of a process whose children are not listed as users of a GPU.
    """
    try:
        nvml = importlib.import_module("pynvml") if nvml is None else nvml
    except ImportError:
        return GpuReport(error="the package nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
        num_gpus = nvml.nvmlDeviceGetCount()
    except Exception as error:  # noqa: BLE001  # NVMLError, and whatever a broken library raises
        return GpuReport(error=_text(error))
    gpus = [_read_gpu(nvml, index, root, without_children_of) for index in range(num_gpus)]
    _attempt(nvml.nvmlShutdown)
    visible = (os.environ if env is None else env).get("CUDA_VISIBLE_DEVICES")
    chosen = gpus if visible is None else _only_visible(gpus, visible)
    hidden = (gpu.pci_address for gpu in gpus if gpu not in chosen and gpu.pci_address)
    return GpuReport(gpus=tuple(chosen), hidden=tuple(hidden))


def _read_gpu(nvml: Any, index: int, root: Path, ignored_parent: int | None) -> GpuHealth:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except Exception as error:  # noqa: BLE001  # NVMLError, such as that the GPU is lost
        return GpuHealth(index=index, error=_text(error))

    def ask(name: str, *arguments: Any) -> Any:
        """Return what a function of the library returns for this GPU; None if it cannot tell."""
        return _attempt(lambda: getattr(nvml, name)(handle, *arguments))

    remapped = ask("nvmlDeviceGetRemappedRows")
    retired = ask("nvmlDeviceGetRetiredPagesPendingStatus")
    pending = [bool(value) for value in (remapped and remapped[2], retired) if value is not None]
    limits = ask("nvmlDeviceGetCurrentClocksEventReasons")
    if limits is None:  # the driver is older than version 535
        limits = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    return GpuHealth(
        index=index,
        name=_plain(ask("nvmlDeviceGetName")),
        uuid=_plain(ask("nvmlDeviceGetUUID")),
        pci_address=_pci_address(ask("nvmlDeviceGetPciInfo")),
        uncorrected_errors=ask("nvmlDeviceGetTotalEccErrors", _UNCORRECTED, _VOLATILE),
        has_pending_repair=any(pending) if pending else None,
        has_failed_repair=None if remapped is None else bool(remapped[3]),
        clock_limits=None
        if limits is None
        else tuple(name for bit, name in CLOCK_LIMITS.items() if limits & bit),
        power_limit_watts=_watts(ask("nvmlDeviceGetEnforcedPowerLimit")),
        default_power_limit_watts=_watts(ask("nvmlDeviceGetPowerManagementDefaultLimit")),
        is_persistent=_flag(ask("nvmlDeviceGetPersistenceMode")),
        performance_state=ask("nvmlDeviceGetPerformanceState"),
        pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
        max_pcie_width=ask("nvmlDeviceGetMaxPcieLinkWidth"),
        pcie_generation=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        max_pcie_generation=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        nvlinks=_links(ask),
        processes=_processes(ask("nvmlDeviceGetComputeRunningProcesses"), root, ignored_parent),
    )


def _links(ask: Callable[..., Any]) -> tuple[bool, ...]:
    """Return whether each link is active; the library refuses numbers that the GPU lacks."""
    states = []
    for link in range(_MAX_LINKS):
        state = ask("nvmlDeviceGetNvLinkState", link)
        if state is None:
            break
        states.append(bool(state))
    return tuple(states)


def _processes(
    found: Sequence[Any] | None, root: Path, ignored_parent: int | None
) -> tuple[GpuProcess, ...] | None:
    if found is None:
        return None
    return tuple(
        GpuProcess(
            pid=process.pid,
            name=_read(root / "proc" / str(process.pid) / "comm"),
            memory_bytes=process.usedGpuMemory,
        )
        for process in found
        if ignored_parent is None or _parent(process.pid, root) != ignored_parent
    )


def _parent(pid: int, root: Path) -> int | None:
    """Return the id of the parent of a process; None if this namespace does not show it."""
    fields = (_read(root / "proc" / str(pid) / "stat") or "").rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 and fields[1].isdigit() else None


def _only_visible(gpus: Sequence[GpuHealth], visible: str) -> list[GpuHealth]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES shows; all if it names parts of GPUs (MIG)."""
    entries = [entry.strip() for entry in visible.split(",")]
    if any(entry.startswith("MIG-") for entry in entries):
        return list(gpus)
    chosen = []
    for entry in entries:
        matching = [
            gpu
            for gpu in gpus
            if entry == str(gpu.index)
            or (entry.startswith("GPU-") and (gpu.uuid or "").startswith(entry))
        ]
        if not matching:
            break  # CUDA stops at the first entry that is not a device
        chosen += matching
    return chosen


def _pci_address(info: Any) -> str | None:
    """Return an address as Linux writes it; NVML writes the domain with eight digits."""
    address = _plain(getattr(info, "busId", None))
    if address is None or address.count(":") != 2:
        return None
    domain, rest = address.lower().split(":", 1)
    return f"{domain[-4:]}:{rest}"


def _plain(value: Any) -> str | None:
    """Return text of the library, which is bytes in some of its versions."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return None if value is None else str(value)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _flag(value: int | None) -> bool | None:
    return None if value is None else bool(value)


def _attempt(function: Callable[[], Any]) -> Any:
    """Return what a function of the library returns; None if it fails."""
    try:
        return function()
    except Exception:  # noqa: BLE001  # NVMLError: the driver, or this GPU, does not support it
        return None


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
