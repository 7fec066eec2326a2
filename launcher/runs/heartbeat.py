"""health/rank<N>.json: the heartbeat of each rank, written about once a second.

The first rank that reaches a limit of `hang_timeout` writes health/hang.
`launcher.engine.ranks.watchdog` writes the files; this module defines and reads them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import RunDirError
from launcher.json_file import Count, Moment, find_json
from launcher.runs.rundir import RunDir

_MAX_BYTES = 1 << 16
"""Largest heartbeat that is read: there may be thousands of them."""

PHASES = ("starting", "reading data", "computing", "evaluating", "saving", "finishing")
"""The phases of a rank, in the order of a step."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The step, phase and device use of a rank at one moment."""

    rank: Count
    node: str
    pid: Count
    step: Count
    """Optimizer steps taken."""

    phase: str
    """What the rank is doing, one of `PHASES`."""

    since: Moment
    """When the phase began, in seconds since 1970."""

    time: Moment
    """When the heartbeat was written, in seconds since 1970."""

    stalled: bool = False
    """Whether the run hangs: this rank, or another one, has reached a limit of `hang_timeout`."""

    where: str = ""
    """File, line and function of the main thread, if the run hangs."""

    waits: bool = False
    """Whether `where` is a call in which ranks wait for each other."""

    memory_bytes: Count = 0
    """Memory in use on the GPU, by all processes; on a CPU the memory of this process."""

    memory_total_bytes: Count = 0
    """Memory of the GPU; 0 on a CPU."""

    utilisation: float | None = None
    """Utilisation of the GPU or of one core, from 0 to 1; None if unknown."""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """The limit of `hang_timeout` that a rank has reached."""

    phase: str
    """The phase of the limit: start, step, evaluation or save."""

    seconds: float
    """The limit."""


def find_hang(run_dir: RunDir, *, since: float) -> Hang | None:
    """Return the limit that a rank has reached since a time in seconds since 1970, or None."""
    with contextlib.suppress(OSError, RunDirError):
        if run_dir.hang.stat().st_mtime > since:
            return find_json(run_dir.hang, Hang, max_bytes=_MAX_BYTES)
    return None


def read_heartbeat(run_dir: RunDir, rank: int) -> Heartbeat | None:
    """Return the last heartbeat of `rank`, or None if it has written none that can be read."""
    with contextlib.suppress(RunDirError):
        return find_json(run_dir.health(rank), Heartbeat, max_bytes=_MAX_BYTES)
    return None


def is_running(pid: int) -> bool:
    """Return whether process `pid` runs on this machine; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()  # a process has a name of any bytes
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


def read_heartbeats(run_dir: RunDir) -> Iterator[Heartbeat]:
    """Yield the last heartbeat of each rank, in the order of ranks."""
    names = (path.stem.removeprefix("rank") for path in run_dir.health(0).parent.glob("rank*.json"))
    for rank in sorted(int(name) for name in names if name.isascii() and name.isdigit()):
        heartbeat = read_heartbeat(run_dir, rank)
        if heartbeat is not None:
            yield heartbeat
