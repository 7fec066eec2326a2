"""Where each rank is: what it says of itself about once a second, for whoever asks.

health/rank<N>.json in the run folder; written by `launcher.engine.ranks.watchdog`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.runs.rundir import RunDir

PHASES = ("starting", "reading data", "computing", "evaluating", "saving", "finishing")
"""What a rank can be doing, in the order of a step."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What a rank says of itself."""

    rank: int
    node: str
    pid: int
    step: int
    """Steps taken."""

    phase: str
    since: float
    """When it began that, in seconds since 1970."""

    time: float
    """When it said so."""

    stalled: bool = False
    where: str = ""
    """Where its main thread is, if it is stalled."""

    waits: bool = False
    """Whether that is a place where ranks wait for each other."""

    memory_bytes: int = 0
    """Of the GPU, whoever uses it; on CPUs what this process holds."""

    memory_total_bytes: int = 0
    """Of the GPU; 0 on CPUs."""

    utilisation: float | None = None
    """Of the GPU, or of a core; None where that is not known."""


def read_heartbeat(run_dir: RunDir, rank: int) -> Heartbeat | None:
    """Return what `rank` last said of itself; None where it has not."""
    try:
        return Heartbeat(**json.loads(run_dir.health(rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_running(pid: int) -> bool:
    """Return whether there is a process `pid` on this machine that has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def read_heartbeats(run_dir: RunDir) -> Iterator[Heartbeat]:
    """Yield what each rank last said of itself, in the order of ranks."""
    names = (path.stem.removeprefix("rank") for path in run_dir.health(0).parent.glob("rank*.json"))
    for rank in sorted(int(name) for name in names if name.isdigit()):
        health = read_heartbeat(run_dir, rank)
        if health is not None:
            yield health
