"""What was looked at and found: values that travel from ranks to whoever shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failure"]

LEVELS: tuple[Level, ...] = ("ok", "warning", "failure")
"""From good to bad."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    found: str
    remedy: str = ""
    """What to do about it, where it is not ok."""


def ok(check: str, found: str) -> Finding:
    """Return that nothing is wrong with what was looked at."""
    return Finding(check=check, level="ok", found=found)


def warning(check: str, found: str, remedy: str) -> Finding:
    """Return that a run would be slower, or may fail later."""
    return Finding(check=check, level="warning", found=found, remedy=remedy)


def failure(check: str, found: str, remedy: str) -> Finding:
    """Return that a run would fail, or be wrong."""
    return Finding(check=check, level="failure", found=found, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class RankDiagnostics:
    """What one rank found out about itself and its group."""

    rank: int
    node: str
    versions: Mapping[str, str]
    """Of Python and packages, of CUDA and NCCL where there are."""

    device: str
    """Its name."""

    device_memory: tuple[int, int] | None
    """Free and all bytes of the GPU's."""

    torchvision: str
    """Why torchvision cannot be imported; empty if it can or is not installed."""

    product_error: float | None
    """Largest error of a matrix product, relative to its largest entry; None: not finite."""

    flops: float
    """Floating-point operations a second in that product."""

    meeting_seconds: float
    """Until the group of ranks was formed."""

    reduce_seconds: float | None
    """Of an all-reduce of 8 bytes, the median; None on one rank."""

    reduce_bandwidth: float | None
    """Bytes a second that each rank sends in an all-reduce of a large tensor, in a ring."""

    sums_right: bool
    """Whether all-reduces gave what they should."""

    node_findings: tuple[Finding, ...] = ()
    """What its node's first rank found of the node, where nobody else looked."""


def worst(findings: Iterable[Finding]) -> Level:
    """Return the level of the worst of them."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")
