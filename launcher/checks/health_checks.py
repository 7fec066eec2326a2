"""Findings about the health of the GPUs and InfiniBand adapters of one node."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.environment.gpu_health import GpuHealth, GpuProcess, GpuReport, read_gpus
from launcher.environment.infiniband import InfinibandPort, read_infiniband
from launcher.environment.kernel_log import Xid, read_xids
from launcher.environment.within_time import call_within
from launcher.findings import Finding, failure, ok, warning
from launcher.planning.derivations import counted
from launcher.quantities import size

_SECONDS_FOR_DRIVER = 30.0
"""Longest wait for the driver, which may first have to start every GPU of the node."""

_XIDS_OF_PROGRAMS = {13, 31, 43, 45}
"""Errors that a program causes itself, for example by an access outside its memory."""

_BUSY_STATES = range(3)
"""Performance states in which a GPU computes, and the link to it should be at full speed."""

_MIN_FOREIGN_BYTES = 1 << 30
"""Memory from which a process counts that this namespace does not show."""

_MAX_SHOWN = 4


def check_health(
    root: Path = Path("/"),
    *,
    read: Callable[[], GpuReport] | None = None,
    launched_by: int | None = None,
) -> Iterator[Finding]:
    """Yield the findings about the GPUs and the InfiniBand adapters of this node.

    A driver that does not answer in time is a finding.

    Args:
        root: Root of the files of /dev, /proc and /sys that are read.
        read: Reads the GPUs; None asks NVIDIA's management library.
        launched_by: Id of the process that started the ranks, whose other children may already
            use the GPUs; None if no ranks are running.
    """
    if (root / "proc/driver/nvidia").exists() or read is not None:
        report = call_within(
            _SECONDS_FOR_DRIVER,
            read or (lambda: read_gpus(root=root, without_children_of=launched_by)),
            GpuReport,
        )
        if report is None:
            yield failure(
                "GPU health",
                f"the driver has not answered within {_SECONDS_FOR_DRIVER:.0f} s",
                "see whether `nvidia-smi` answers, and what `dmesg` says; a GPU that has failed "
                "often needs a restart of the machine",
            )
        else:
            yield from judge_gpus(report)
        yield from judge_xids(read_xids(root), report)
    yield from judge_infiniband(read_infiniband(root))


def judge_gpus(report: GpuReport) -> Iterator[Finding]:
    """Yield the findings about the GPUs: for each check the GPUs at fault, or one that is ok."""
    if report.error is not None:
        yield warning(
            "GPU health",
            f"unknown: NVIDIA's management library says: {report.error}",
            "install nvidia-ml-py and a driver whose `nvidia-smi` works",
        )
        return
    for gpu in report.gpus:
        if gpu.error is not None:
            yield failure(
                "GPU health",
                f"GPU {gpu.index} cannot be used: {gpu.error}",
                "restart the machine; if that does not help, have the GPU replaced",
            )
    gpus = [gpu for gpu in report.gpus if gpu.error is None]
    if not gpus:
        return
    yield from _each(gpus, "ECC memory", _memory_failure, _memory_summary(gpus))
    yield from _pending_repairs(gpus)
    yield from _each(gpus, "clocks", _lowered_clocks, "not lowered")
    yield from _each(gpus, "power limit", _power_limit, _power_summary(gpus))
    yield from _persistence(gpus)
    yield from _each(gpus, "PCIe", _narrow_link, _pcie_summary(gpus))
    yield from _nvlinks(gpus)
    yield from _each(gpus, "GPU users", _foreign_processes, _users_summary(gpus))


def _each(
    gpus: Sequence[GpuHealth],
    check: str,
    judge: Callable[[GpuHealth], Finding | None],
    summary: str,
) -> Iterator[Finding]:
    """Yield what `judge` finds about each GPU, with its name, or one finding that is ok."""
    judged = [(gpu, judge(gpu)) for gpu in gpus]
    if not any(finding for _, finding in judged):
        yield ok(check, summary)
    for gpu, finding in judged:
        if finding is not None:
            yield replace(finding, found=f"{_named(gpu)}: {finding.found}")


def _named(gpu: GpuHealth) -> str:
    address = f", {gpu.pci_address}" if gpu.pci_address else ""
    return f"GPU {gpu.index} ({gpu.name or 'unknown'}{address})"


def _memory_failure(gpu: GpuHealth) -> Finding | None:
    if gpu.has_failed_repair:
        return failure(
            "ECC memory",
            "its memory has failed rows and no spare ones are left",
            "have the GPU replaced",
        )
    if gpu.uncorrected_errors:
        return failure(
            "ECC memory",
            f"{counted(gpu.uncorrected_errors, 'memory error')} could not be corrected since the "
            "driver was loaded",
            "take it out of service, and reset it with `nvidia-smi --gpu-reset` or restart the "
            "machine; have it replaced if the errors return",
        )
    return None


def _memory_summary(gpus: Sequence[GpuHealth]) -> str:
    known = [gpu for gpu in gpus if gpu.uncorrected_errors is not None]
    if not known:
        return "not counted: the GPUs have no ECC, or it is off"
    return f"no uncorrected error on {counted(len(known), 'GPU')}"


def _pending_repairs(gpus: Sequence[GpuHealth]) -> Iterator[Finding]:
    for gpu in gpus:
        if gpu.has_pending_repair:
            yield warning(
                "ECC memory",
                f"{_named(gpu)}: failed memory is replaced by spare memory at the next reset",
                "reset it with `nvidia-smi --gpu-reset` or restart the machine",
            )


def _lowered_clocks(gpu: GpuHealth) -> Finding | None:
    if not gpu.clock_limits:
        return None
    return warning(
        "clocks",
        f"its clocks are lowered at this moment: {', '.join(gpu.clock_limits)}",
        "check power supply and cooling (`nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER`); "
        "every step waits for the slowest GPU",
    )


def _power_limit(gpu: GpuHealth) -> Finding | None:
    limit, default = gpu.power_limit_watts, gpu.default_power_limit_watts
    if limit is None or default is None or limit >= default:
        return None
    return warning(
        "power limit",
        f"it is limited to {limit:.0f} W; its default is {default:.0f} W",
        f"`nvidia-smi -i {gpu.index} -pl {default:.0f}` restores the default, if the machine can "
        "supply and cool it",
    )


def _power_summary(gpus: Sequence[GpuHealth]) -> str:
    limits = {gpu.power_limit_watts for gpu in gpus if gpu.power_limit_watts is not None}
    return " or ".join(f"{limit:.0f} W" for limit in sorted(limits)) or "unknown"


def _persistence(gpus: Sequence[GpuHealth]) -> Iterator[Finding]:
    off = [gpu for gpu in gpus if gpu.is_persistent is False]
    if off:
        yield warning(
            "persistence",
            f"off on GPU {', '.join(str(gpu.index) for gpu in off)}",
            "run nvidia-persistenced, or `nvidia-smi -pm 1`: otherwise the driver stops when no "
            "process uses a GPU, and each start takes seconds longer",
        )
    elif any(gpu.is_persistent for gpu in gpus):
        yield ok("persistence", "on")


def _narrow_link(gpu: GpuHealth) -> Finding | None:
    remedy = (
        "reseat the GPU, or check its riser and the settings of its slot: copies from the host "
        "are slower"
    )
    width, most = gpu.pcie_width, gpu.max_pcie_width
    if width is not None and most is not None and width < most:
        return warning("PCIe", f"{width} of {most} lanes are in use", remedy)
    generation, newest = gpu.pcie_generation, gpu.max_pcie_generation
    is_busy = gpu.performance_state in _BUSY_STATES
    if is_busy and generation is not None and newest is not None and generation < newest:
        found = f"generation {generation} is in use and {newest} is possible"
        return warning("PCIe", found, remedy)
    return None


def _pcie_summary(gpus: Sequence[GpuHealth]) -> str:
    links = Counter(
        f"generation {gpu.max_pcie_generation} with {gpu.pcie_width} lanes"
        for gpu in gpus
        if gpu.max_pcie_generation is not None and gpu.pcie_width is not None
    )
    return ", ".join(f"{number} x {link}" for link, number in links.items()) or "unknown"


def _nvlinks(gpus: Sequence[GpuHealth]) -> Iterator[Finding]:
    """Compare the active links of each GPU with the most of any GPU of its kind.

    GPUs without a bridge have links that are all inactive, and some kinds have links that are
    never used.
    """
    most: dict[str | None, int] = {}
    for gpu in gpus:
        most[gpu.name] = max(most.get(gpu.name, 0), sum(gpu.nvlinks))

    def judge(gpu: GpuHealth) -> Finding | None:
        if not gpu.nvlinks or sum(gpu.nvlinks) == most[gpu.name]:
            return None
        down = [str(link) for link, is_active in enumerate(gpu.nvlinks) if not is_active]
        return warning(
            "NVLink",
            f"{sum(gpu.nvlinks)} links are active, and {most[gpu.name]} on others of its kind; "
            f"inactive: {', '.join(down)}",
            "check `nvidia-smi nvlink --status` and nvidia-fabricmanager, or reseat the bridge: "
            "all-reduce runs at the speed of the slowest GPU",
        )

    if any(gpu.nvlinks for gpu in gpus):
        states = Counter(f"{sum(gpu.nvlinks)} of {len(gpu.nvlinks)}" for gpu in gpus)
        texts = [f"{state} links active on {counted(n, 'GPU')}" for state, n in states.items()]
        yield from _each(gpus, "NVLink", judge, ", ".join(texts))


def _foreign_processes(gpu: GpuHealth) -> Finding | None:
    processes = [process for process in gpu.processes or () if _counts(process)]
    if not processes:
        return None
    shown = ", ".join(map(_process_text, processes[:_MAX_SHOWN]))
    more = f" and {len(processes) - _MAX_SHOWN} more" if len(processes) > _MAX_SHOWN else ""
    return warning(
        "GPU users",
        f"used by {shown}{more}",
        "end these processes, or choose other GPUs with CUDA_VISIBLE_DEVICES: they take memory "
        "and time from a run",
    )


def _counts(process: GpuProcess) -> bool:
    """Return whether a process is certain to be another user's, and not one of this command.

    Where this namespace does not show a process, it may be a rank that has just started.
    """
    return process.name is not None or (process.memory_bytes or 0) >= _MIN_FOREIGN_BYTES


def _process_text(process: GpuProcess) -> str:
    name = process.name or "another container"
    memory = "" if process.memory_bytes is None else f", {size(process.memory_bytes)}"
    return f"process {process.pid} ({name}{memory})"


def _users_summary(gpus: Sequence[GpuHealth]) -> str:
    return "unknown" if all(gpu.processes is None for gpu in gpus) else "no other process"


def judge_xids(xids: Sequence[Xid] | None, report: GpuReport | None) -> Iterator[Finding]:
    """Yield a finding for each GPU with errors of its hardware in the kernel's log, or one for all.

    Args:
        xids: The errors in the log; None if it cannot be read.
        report: What is known of the GPUs. Errors of GPUs that are hidden do not count.
    """
    if xids is None:
        who = "" if os.geteuid() == 0 else " by this user"
        yield ok("Xid errors", f"unknown: the kernel's log cannot be read{who} (`sudo dmesg`)")
        return
    hidden = {address.rpartition(".")[0] for address in (report.hidden if report else ())}
    faults = [
        xid
        for xid in xids
        if xid.number not in _XIDS_OF_PROGRAMS and xid.pci_address.partition(".")[0] not in hidden
    ]
    if not faults:
        others = f"; {counted(len(xids), 'error')} of programs or of other GPUs" if xids else ""
        yield ok("Xid errors", f"none of the hardware since this machine was started{others}")
    for address in dict.fromkeys(xid.pci_address for xid in faults):
        own = [xid for xid in faults if xid.pci_address == address]
        counts = Counter(xid.number for xid in own)
        numbers = ", ".join(f"{number} ({n} times)" for number, n in counts.most_common(_MAX_SHOWN))
        yield warning(
            "Xid errors",
            f"the GPU at PCI {address} had Xid {numbers}; the last one: {own[-1].text[:100]}",
            "look the numbers up in NVIDIA's catalogue of Xid errors; take the GPU out of service "
            "if they return after a restart",
        )


def judge_infiniband(ports: Sequence[InfinibandPort]) -> Iterator[Finding]:
    """Yield the findings about InfiniBand and RoCE ports; none without adapters."""
    if not ports:
        return
    active = [port for port in ports if port.state == "ACTIVE"]
    for port in ports:
        if port.state not in ("ACTIVE", "DOWN", None):
            yield warning(
                "InfiniBand",
                f"port {port.port} of {port.device} is in state {port.state}",
                "see whether a subnet manager runs, and what `ibstat` says",
            )
    fastest: dict[str | None, float] = {}
    for port in active:
        fastest[port.link_layer] = max(fastest.get(port.link_layer, 0.0), port.gigabits or 0.0)
    for port in active:
        best = fastest[port.link_layer]
        if port.link_layer == "InfiniBand" and port.gigabits and port.gigabits < best:
            yield warning(
                "InfiniBand",
                f"port {port.port} of {port.device} runs at {port.gigabits:g} Gb/s, and others at "
                f"{best:g} Gb/s",
                "check its cable with `ibstat` and `iblinkinfo`, or leave it out with NCCL_IB_HCA",
            )
    if active:
        rates = Counter(f"{port.gigabits or 0:g} Gb/s ({port.link_layer})" for port in active)
        listed = ", ".join(f"{number} x {rate}" for rate, number in rates.items())
        yield ok("InfiniBand", f"{len(active)} of {counted(len(ports), 'port')} active: {listed}")
    else:
        yield warning(
            "InfiniBand",
            f"none of {counted(len(ports), 'port')} is active",
            "check the cables and `ibstat`: between nodes NCCL would use TCP, which is slower",
        )
