"""A process that owns something, told apart from every other process of every machine."""

from __future__ import annotations

import os
import platform
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.json_file import Count, Moment
from launcher.recipe.text_values import digits
from launcher.runs.provenance import command_line


@dataclass(frozen=True, kw_only=True)
class ProcessOwner:
    """A process that owns something, in a form that other machines can read."""

    host: str
    """Name of the owner's machine."""

    place: str
    """Boot id and process namespace of that machine, within which `pid` identifies a process."""

    pid: Count
    """Process id of the owner."""

    started: Count
    """Start time of the process in clock ticks, which tells it from a later one with its `pid`."""

    since: Moment
    """When the process became the owner, in seconds since 1970."""

    job: str | None
    """Slurm job id; None outside Slurm."""

    restarts: int
    """How often Slurm had requeued the job."""

    command: str
    """Command line of the owner, without the values of keys and passwords."""

    @property
    def is_here(self) -> bool:
        """Whether this process can look up the owner's process."""
        return self.place == _place_of_this_process()

    @property
    def is_dead(self) -> bool:
        """Whether the owner has certainly ended."""
        if self.is_here:
            return _start_time(self.pid) != self.started
        job, restarts = _slurm_job()
        return job is not None and self.job == job and self.restarts < restarts

    @property
    def words(self) -> str:
        """Job, machine and process id of the owner, for messages."""
        job = f"job {self.job} on " if self.job is not None else ""
        return f"{job}{self.host} (pid {self.pid})"


def this_process() -> ProcessOwner:
    """Return this process as an owner."""
    job, restarts = _slurm_job()
    return ProcessOwner(
        host=platform.node(),
        place=_place_of_this_process(),
        pid=os.getpid(),
        started=_start_time(os.getpid()) or 0,
        since=time.time(),
        job=job,
        restarts=restarts,
        command=shlex.join(command_line()),
    )


def _slurm_job() -> tuple[str | None, int]:
    """Return the Slurm job id of this process, or None, and how often the job was requeued."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return os.environ.get("SLURM_JOB_ID"), digits(restarts) or 0


def _place_of_this_process() -> str:
    """Return the boot id and process namespace of this process, after the machine's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{platform.node()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return platform.node()


def _start_time(pid: int) -> int | None:
    """Return the start time of a process in clock ticks; None if it has ended."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()  # a process has a name of any bytes
    except OSError:
        return None
    fields = content.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
