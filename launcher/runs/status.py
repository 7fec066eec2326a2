"""The state of a run, read from the files in its folder alone.

No process and no scheduler is contacted, so that any user who can read the folder gets an answer.
"""

from __future__ import annotations

import io
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from launcher.errors import RunDirError
from launcher.json_file import Count, decode_line
from launcher.paths import is_file
from launcher.quantities import duration
from launcher.regular_file import open_regular
from launcher.runs.events import Stopped, read_events
from launcher.runs.failure_record import read_failure
from launcher.runs.final_result import read_result
from launcher.runs.heartbeat import Heartbeat, is_running, read_heartbeats
from launcher.runs.owner_file import may_have_owner
from launcher.runs.rundir import RunDir

COLOURS = {
    "running": "cyan",
    "waiting": "blue",
    "failed": "red",
    "lost": "red",
    "stopped": "yellow",
    "cancelled": "yellow",
    "unknown": "white",
    "finished": "green",
}
"""Colour of each state of a run, in the order in which tables list the states."""

STATES = tuple(COLOURS)
"""Names of the states, in the same order."""

ACTIVE_STATES = "running", "waiting"
"""States of runs that have not ended."""

_MESSAGE_WIDTH = 160
"""Characters of a failure's message that are shown; failure.json holds all of it."""

_REMOTE_TIMEOUT_SECONDS = 30.0
"""Age of the last heartbeat at which a rank on another machine counts as dead."""

_LOCAL_TIMEOUT_SECONDS = 600.0
"""Age of the last heartbeat at which a process of this machine with the rank's process id counts as
another process."""

SECONDS_TO_START = 120.0
"""Longest time from the creation of a run folder to the first heartbeat, in which data may be
downloaded and torch may be imported from a slow file system."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run."""

    name: str
    """Name of the state, one of `STATES`."""

    words: str
    """One line that describes it, with the step or the error."""


def read_run_state(run_dir: RunDir) -> RunState:
    """Return the state of a run."""
    heartbeats = list(read_heartbeats(run_dir))
    if not heartbeats and _is_starting(run_dir):
        return RunState(name="running", words="starting")
    if any(map(is_alive, heartbeats)) and _modified(run_dir.result) < _modified(run_dir.run_yaml):
        return RunState(name="running", words=progress_text(run_dir))
    if (ended := read_outcome(run_dir)) is not None:
        return ended
    if is_file(run_dir.run_yaml):
        return _unfinished(run_dir)
    if is_file(run_dir.submission):
        return RunState(name="waiting", words="submitted")
    return RunState(name="unknown", words="has neither run.yaml nor submission.json")


def _is_starting(run_dir: RunDir) -> bool:
    """Return whether a run was started or resumed a moment ago and its ranks are yet to come."""
    started = _modified(run_dir.run_yaml)
    ended = max(_modified(run_dir.result), _modified(run_dir.failure))
    is_recent = started > ended and time.time() - started < SECONDS_TO_START
    return is_recent and may_have_owner(run_dir)


def _modified(path: Path) -> float:
    """Return when a file was last written, in seconds since 1970; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _unfinished(run_dir: RunDir) -> RunState:
    """Return the state of a run that has ended and recorded neither result nor failure."""
    events = read_events(run_dir)
    if events and isinstance(events[-1], Stopped):
        return RunState(name="stopped", words=f"stopped after step {events[-1].step:,}")
    row = last_step(run_dir.metrics)
    where = f"after step {row.step:,}" if row else "before its first step"
    return RunState(name="lost", words=f"ended without a result or an error {where}")


def is_alive(health: Heartbeat) -> bool:
    """Return whether the rank that wrote a heartbeat is still alive.

    A rank on this machine is alive while its process runs; a rank on another machine while its
    heartbeat is recent.
    """
    age = time.time() - health.time
    if health.node == platform.node():
        return is_running(health.pid) and age < _LOCAL_TIMEOUT_SECONDS
    return age < _REMOTE_TIMEOUT_SECONDS


def read_outcome(run_dir: RunDir) -> RunState | None:
    """Return the state of a run that recorded a result or a failure, or None.

    A resumed run removes both files, so that neither describes an earlier attempt.
    """
    try:
        result = read_result(run_dir)
    except RunDirError as error:
        return RunState(name="unknown", words=str(error))
    if result is not None:
        shown = ", ".join(f"{name} {number_text(v)}" for name, v in result.metrics.items())
        return RunState(name="finished", words=f"finished after {result.steps:,} steps: {shown}")
    try:
        failure = read_failure(run_dir)
    except RunDirError as error:
        return RunState(name="failed", words=f"failed: {error}")
    if failure is None:
        return None
    head = shorten(failure.message.partition("\n")[0], _MESSAGE_WIDTH, placeholder=" ...")
    where = f"rank {failure.rank} ({failure.node})"
    return RunState(name="failed", words=f"failed on {where}: {failure.error}: {head}".rstrip(": "))


def progress_text(run_dir: RunDir, total_steps: int | None = None) -> str:
    """Return one line with the last recorded step, its loss and the throughput.

    Args:
        run_dir: The run folder.
        total_steps: Steps of the whole run; adds the time that is left. None if unknown.
    """
    row = last_step(run_dir.metrics)
    if row is None:
        return "starting"
    total = "" if total_steps is None else f" of {total_steps:,}"
    throughput = row.samples_per_second or 0
    text = f"step {row.step:,}{total}, loss {number_text(row.loss)}, {throughput:,.0f} samples/s"
    if total_steps is None:
        return text
    samples_left = (total_steps - row.step) * (row.samples / row.step)
    seconds_left = samples_left / throughput if throughput else None
    return f"{text}, {duration(seconds_left)} left"


class LastStep(Struct, frozen=True):
    """A line of metrics.jsonl that describes a step, as far as a state shows it."""

    step: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    loss: float | None
    samples_per_second: float | None
    samples: Count = 0


def last_step(path: Path) -> LastStep | None:
    """Return the last complete line of metrics.jsonl that describes a step, or None.

    Only the last 64 KiB of the file are read.
    """
    try:
        with io.BufferedReader(open_regular(path)) as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 65536, 0))
            lines = file.read(65536).splitlines()
    except OSError:
        return None
    decoder = msgspec.json.Decoder(LastStep)
    rows = (decode_line(line, decoder) for line in reversed(lines))
    return next((row for row in rows if row is not None), None)


def number_text(value: float | None) -> str:
    """Return a number with four significant digits, or `nan` for None, which stands for it."""
    return "nan" if value is None else f"{value:.4g}"
