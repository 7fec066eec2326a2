"""How a run fares, by what it has left in its folder; nobody is asked."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from launcher.errors import RunDirError
from launcher.quantities import duration
from launcher.runs.events import read_events
from launcher.runs.failure_record import read_failure
from launcher.runs.heartbeat import Heartbeat, is_running, read_heartbeats
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
"""Of what a run can be, in the order in which one wants to know of them."""

STATES = tuple(COLOURS)

AT_WORK = "running", "waiting"
"""Those that are not over."""

_WIDTH = 160
"""Of what is said of a failure here; failure.json has all of it."""

_SECONDS_OF_SILENCE = 30.0
"""After which a rank on another machine has gone; on this one its process is looked for."""

_SECONDS_FROZEN = 600.0
"""After which a process of this machine is taken for another that has its number."""

SECONDS_TO_START = 120.0
"""Between a run folder and its first rank, where data is downloaded or torch comes from afar."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How a run fares."""

    name: str
    """One of `STATES`."""

    words: str


def read_run_state(run_dir: RunDir) -> RunState:
    """Return how the run fares."""
    health = list(read_heartbeats(run_dir))
    if not health and _begins(run_dir):
        return RunState(name="running", words="starting")
    if any(map(is_alive, health)) and _changed(run_dir.result) < _changed(run_dir.run_yaml):
        return RunState(name="running", words=progress_words(run_dir))
    if (ended := outcome(run_dir)) is not None:
        return ended
    if run_dir.run_yaml.is_file():
        return _unfinished(run_dir)
    if run_dir.submission.is_file():
        return RunState(name="waiting", words="submitted")
    return RunState(name="unknown", words="left nothing")


def _begins(run_dir: RunDir) -> bool:
    """Return whether it has just been begun, or gone on with, and its ranks are still to come."""
    begun = _changed(run_dir.run_yaml)
    ended = max(_changed(run_dir.result), _changed(run_dir.failure))
    return begun > ended and time.time() - begun < SECONDS_TO_START


def _changed(path: Path) -> float:
    """Return when a file was last written; long ago where it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _unfinished(run_dir: RunDir) -> RunState:
    """Return the state of a run that is over and has left neither result nor failure."""
    events = read_events(run_dir)
    if events and events[-1]["event"] == "stopped":
        return RunState(name="stopped", words=f"stopped after step {events[-1]['step']:,}")
    row = last_step(run_dir.metrics)
    where = f"after step {row['step']:,}" if row else "before its first step"
    return RunState(name="lost", words=f"ended without a word {where}")


def is_alive(health: Heartbeat) -> bool:
    """Return whether the rank that has said this of itself is still there."""
    silent = time.time() - health.time
    if health.node == platform.node():
        return is_running(health.pid) and silent < _SECONDS_FROZEN
    return silent < _SECONDS_OF_SILENCE


def outcome(run_dir: RunDir) -> RunState | None:
    """Return what a run came to that has ended; None where it has left neither result nor failure.

    One that goes on has taken both away.
    """
    if (result := read_result(run_dir)) is not None:
        values = result["evaluation"] or {"loss": result["train_loss"]}
        shown = ", ".join(f"{name} {number_text(value)}" for name, value in values.items())
        return RunState(name="finished", words=f"finished after {result['steps']:,} steps: {shown}")
    try:
        failure = read_failure(run_dir)
    except RunDirError as error:
        return RunState(name="failed", words=f"failed: {error}")
    if failure is None:
        return None
    head = shorten(failure.message.partition("\n")[0], _WIDTH, placeholder=" ...")
    where = f"rank {failure.rank} ({failure.node})"
    return RunState(name="failed", words=f"failed on {where}: {failure.error}: {head}".rstrip(": "))


def progress_words(run_dir: RunDir, total_steps: int | None = None) -> str:
    """Return the last step that was written, and when the run will have ended where that is known.

    Args:
        run_dir: The run's.
        total_steps: How many it takes.
    """
    row = last_step(run_dir.metrics)
    if row is None:
        return "starting"
    whole = "" if total_steps is None else f" of {total_steps:,}"
    speed = row["samples_per_second"] or 0
    said = f"step {row['step']:,}{whole}, loss {number_text(row['loss'])}, {speed:,.0f} samples/s"
    if total_steps is None:
        return said
    per_step = row["samples"] / row["step"]
    left = (total_steps - row["step"]) * per_step / speed if speed else None
    return f"{said}, {duration(left)} left"


def last_step(path: Path) -> dict[str, Any] | None:
    """Return the last whole line of metrics.jsonl that is of a step."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 65536, 0))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if "loss" in row and "samples_per_second" in row:
            return row
    return None


def read_result(run_dir: RunDir) -> dict[str, Any] | None:
    """Return what result.json says; None where there is none, or only a part of one."""
    try:
        values = json.loads(run_dir.result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(values, dict) and {"evaluation", "train_loss", "steps"} <= values.keys()
    return values if whole else None


def number_text(value: float | None) -> str:
    """Return a number in four digits, `nan` where it was not finite."""
    return "nan" if value is None else f"{value:.4g}"
