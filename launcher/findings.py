"""`Finding`: the result of one check, as a value that ranks can send and commands can print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failure"]

LEVELS: tuple[Level, ...] = ("ok", "warning", "failure")
"""The levels from best to worst."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check."""

    check: str
    """Name of what was checked, such as `memory`."""

    level: Level
    found: str
    """What the check found, with its numbers."""

    remedy: str = ""
    """What to do about it; empty if the level is ok."""


def ok(check: str, found: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(check=check, level="ok", found=found)


def warning(check: str, found: str, remedy: str) -> Finding:
    """Return a finding that would make a run slower, or may make it fail later."""
    return Finding(check=check, level="warning", found=found, remedy=remedy)


def failure(check: str, found: str, remedy: str) -> Finding:
    """Return a finding that would make a run fail, or its results wrong."""
    return Finding(check=check, level="failure", found=found, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class RankDiagnostics:
    """What one rank measured of itself, its device and its process group."""

    rank: int
    node: str
    versions: Mapping[str, str]
    """Versions of Python and of packages, and of CUDA and NCCL if there are any."""

    device: str
    """Name of the device."""

    device_memory: tuple[int, int] | None
    """Free and total bytes of the GPU's memory; None on a CPU."""

    torchvision: str
    """Why torchvision cannot be imported; empty if it can, or is not installed."""

    product_error: float | None
    """Largest error of a matrix product, relative to its largest entry; None if not finite."""

    flops: float
    """Floating-point operations per second in that product."""

    rendezvous_seconds: float
    """Seconds until the process group was formed."""

    reduce_seconds: float | None
    """Median seconds of an all-reduce of 8 bytes; None on one rank."""

    reduce_bandwidth: float | None
    """Bytes per second that each rank sends in a ring all-reduce of a large tensor."""

    sums_correct: bool
    """Whether all all-reduces returned the correct sums."""

    numa_node: int | None = None
    """NUMA node of the rank's GPU; None if unknown or not asked for."""

    cpus: str = ""
    """The CPUs that the rank keeps to, such as `0-31`; empty if it is not bound."""

    unbound: str = ""
    """Why the rank is not bound to the CPUs near its GPU; empty if it is, and on CPUs."""

    node_findings: tuple[Finding, ...] = ()
    """Findings about the node by its first rank; empty if the launcher checked the node."""


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level among the findings; ok if there are none."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")
