"""The numbers of a run as Prometheus reads them, from the files in its folder alone.

`metrics_text` returns Prometheus' text format. A run writes it into the folder that the variable
LAUNCHER_PROMETHEUS names, from where the textfile collector of node_exporter takes it; `launcher
watch --prometheus` writes it from outside the run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from launcher.errors import RunDirError
from launcher.json_file import Count, decode_line
from launcher.regular_file import open_regular, size_of
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.events import QUICK, Began, Failed, Saved, Timed, read_events
from launcher.runs.files import write_atomic
from launcher.runs.heartbeat import read_heartbeats
from launcher.runs.rundir import RunDir
from launcher.runs.status import STATES, RunState, read_run_state

_VARIABLE = "LAUNCHER_PROMETHEUS"

_SECONDS_BETWEEN_WRITES = 10.0
"""Prometheus asks every 15 seconds or more rarely in most places."""

_TAIL_BYTES = 1 << 16
"""Bytes of the end of metrics.jsonl that are read for the last step."""

_HELP = {
    "run_state": "1 for the state of the run, 0 for all other states.",
    "ranks": "Ranks of the run.",
    "nodes": "Nodes of the run.",
    "starts_total": "How often the run was started or resumed.",
    "failures_total": "How often the run failed and was started again.",
    "planned_steps": "Steps that max_time has set.",
    "step": "Optimizer steps taken.",
    "samples": "Training samples consumed.",
    "loss": "Mean loss of the last step.",
    "learning_rate": "Learning rate of the last step.",
    "samples_per_second": "Throughput over all ranks.",
    "step_seconds": "Duration of a step.",
    "data_wait_seconds": "Time of a step in which ranks waited for data.",
    "communication_wait_seconds": "Time of a step in which ranks waited for communication.",
    "step_timestamp_seconds": "When the last step ended, in seconds since 1970.",
    "checkpoint_step": "Step of the newest checkpoint.",
    "checkpoint_timestamp_seconds": "When the newest checkpoint was complete.",
    "checkpoint_bytes": "Size of the newest checkpoint.",
    "checkpoint_stall_seconds": "How long a step waited for the newest checkpoint.",
    "checkpoint_write_seconds": "How long the slowest rank wrote the newest checkpoint.",
    "heartbeat_timestamp_seconds": "When the rank whose heartbeat is oldest wrote it.",
    "stalled_ranks": "Ranks that have reached a limit of hang_timeout.",
}
"""What each metric means, by its name without the prefix `launcher_`, in the order of the text."""


class _Row(Struct, frozen=True):
    """The numbers of a line of metrics.jsonl that describes a step; null stands for nan."""

    step: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    loss: float | None
    lr: float | None
    samples: Count
    time: float | None = None
    samples_per_second: float | None = None
    step_seconds: float | None = None
    data_wait_seconds: float | None = None
    communication_seconds: float | None = None


def metrics_text(run_dir: RunDir, state: RunState | None = None) -> str:
    """Return the numbers of a run in Prometheus' text format; unknown ones are left out.

    Args:
        run_dir: The run folder.
        state: The state of the run; None is that of its folder.
    """
    name = state.name if state is not None else read_run_state(run_dir).name
    run = _escaped(run_dir.path.name)
    states = {f'{{run="{run}",state="{each}"}}': float(each == name) for each in STATES}
    samples: dict[str, Mapping[str, float]] = {"run_state": states}
    for metric, value in _numbers(run_dir):
        if value is not None:
            samples[metric] = {f'{{run="{run}"}}': value}
    lines = []
    for metric, words in _HELP.items():
        if metric in samples:
            kind = "counter" if metric.endswith("_total") else "gauge"
            lines += [f"# HELP launcher_{metric} {words}", f"# TYPE launcher_{metric} {kind}"]
            lines += [
                f"launcher_{metric}{labels} {value!r}" for labels, value in samples[metric].items()
            ]
    return "\n".join(lines) + "\n"


class MetricsFile:
    """A file with the numbers of a run, which is replaced every ten seconds at most.

    Args:
        run_dir: The run folder.
        path: The file, which other users can read.
    """

    def __init__(self, run_dir: RunDir, path: Path) -> None:
        self._run_dir, self._path = run_dir, path
        self._written_at = -_SECONDS_BETWEEN_WRITES

    def write(self, state: RunState | None = None, *, now: bool = False) -> None:
        """Write the file if its content is ten seconds old.

        Args:
            state: The state of the run; None is that of its folder.
            now: Whether to write in any case.

        Raises:
            RunDirError: The file cannot be written.
        """
        if not now and time.monotonic() - self._written_at < _SECONDS_BETWEEN_WRITES:
            return
        self._written_at = time.monotonic()
        write_atomic(self._path, metrics_text(self._run_dir, state))
        with contextlib.suppress(OSError):
            self._path.chmod(0o644)

    def remove(self) -> None:
        """Remove the file, so that Prometheus sees the run end."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def metrics_file_of(run_dir: RunDir, env: Mapping[str, str] | None = None) -> MetricsFile | None:
    """Return the file that a run writes for Prometheus; None without LAUNCHER_PROMETHEUS."""
    folder = (os.environ if env is None else env).get(_VARIABLE)
    if not folder:
        return None
    name = re.sub(r"[^A-Za-z0-9._-]", "_", run_dir.path.name)
    return MetricsFile(run_dir, Path(folder) / f"launcher-{name}.prom")


def _numbers(run_dir: RunDir) -> Iterator[tuple[str, float | None]]:
    events = read_events(run_dir)
    starts = [event for event in events if isinstance(event, Began)]
    if starts:
        yield "ranks", starts[-1].ranks
        yield "nodes", starts[-1].nodes
    yield "starts_total", len(starts)
    yield "failures_total", sum(isinstance(event, Failed) for event in events)
    timed = [event.steps for event in events if isinstance(event, Timed)]
    yield "planned_steps", timed[-1] if timed else None
    if (row := _last_row(run_dir.metrics)) is not None:
        yield "step", row.step
        yield "samples", row.samples
        yield "loss", float("nan") if row.loss is None else row.loss
        yield "learning_rate", row.lr
        yield "samples_per_second", row.samples_per_second
        yield "step_seconds", row.step_seconds
        yield "data_wait_seconds", row.data_wait_seconds
        yield "communication_wait_seconds", row.communication_seconds
        yield "step_timestamp_seconds", row.time
    for checkpoint in list_checkpoints(run_dir)[:1]:
        with contextlib.suppress(OSError, RunDirError):
            yield "checkpoint_timestamp_seconds", checkpoint.path.stat().st_mtime
            yield "checkpoint_bytes", sum(size_of(path) for path in checkpoint.path.iterdir())
            yield "checkpoint_step", checkpoint.step
    if saved := [each for each in events if isinstance(each, Saved) and each.place != QUICK]:
        yield "checkpoint_stall_seconds", saved[-1].stall_seconds
        yield "checkpoint_write_seconds", saved[-1].write_seconds
    heartbeats = list(read_heartbeats(run_dir))
    if heartbeats:
        yield "heartbeat_timestamp_seconds", min(heartbeat.time for heartbeat in heartbeats)
        yield "stalled_ranks", sum(heartbeat.stalled for heartbeat in heartbeats)


def _last_row(path: Path) -> _Row | None:
    """Return the last complete line of metrics.jsonl that describes a step, or None."""
    try:
        with io.BufferedReader(open_regular(path)) as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL_BYTES, 0))
            lines = file.read(_TAIL_BYTES).splitlines()
    except OSError:
        return None
    decoder = msgspec.json.Decoder(_Row)
    rows = (decode_line(line, decoder) for line in reversed(lines))
    return next((row for row in rows if row is not None), None)


def _escaped(text: str) -> str:
    """Return text as the value of a label."""
    safe = text.encode(errors="replace").decode()
    return safe.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
