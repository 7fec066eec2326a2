"""Everything that a run has recorded so far, for tables, pages and the live view.

A `History` can be refreshed while the run continues: it then reads only what was appended.
"""

from __future__ import annotations

import math
import os
from array import array
from dataclasses import dataclass, field
from typing import Any

import msgspec

from launcher.runs.events import read_events
from launcher.runs.failure_record import read_failure
from launcher.runs.heartbeat import Heartbeat, read_heartbeats
from launcher.runs.run_record import RunRecord, read_run
from launcher.runs.rundir import RunDir
from launcher.runs.status import RunState, read_result, read_run_state

COLUMNS = (
    "step",
    "samples",
    "time",
    "loss",
    "lr",
    "momentum",
    "grad_norm",
    "samples_per_second",
    "step_seconds",
    "data_wait_seconds",
    "communication_seconds",
)
"""Values kept for each step; nan where a value was not finite or is unknown."""


@dataclass(frozen=True, kw_only=True)
class RankShares:
    """Mean times per step and peak memory of each rank, over the steps since the last such line."""

    step: int
    """The last of these steps."""

    own_seconds: list[float] | None
    """Seconds per step that each rank did not wait for other ranks; None if unknown."""

    data_wait_seconds: list[float]
    """Seconds per step that each rank waited for data."""

    memory_bytes: list[int]
    """Peak memory of each rank."""


@dataclass(kw_only=True)
class _Lines:
    """The content of metrics.jsonl, sorted by kind of line."""

    steps: dict[str, array[float]] = field(
        default_factory=lambda: {name: array("d") for name in COLUMNS}
    )
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    noise: list[tuple[int, float]] = field(default_factory=list)
    ranks: list[RankShares] = field(default_factory=list)
    stalls: list[tuple[int, float]] = field(default_factory=list)
    saves: list[tuple[int, float]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        step = row["step"]
        if "samples_per_second" in row:
            for name, column in self.steps.items():
                column.append(_number(row.get(name)))
        elif "evaluation" in row:
            values = {name: _number(value) for name, value in row["evaluation"].items()}
            self.evaluations.append((step, values))
        elif "ranks" in row:
            self.ranks.append(RankShares(step=step, **row["ranks"]))
        elif row.get("noise_scale") is not None:
            self.noise.append((step, row["noise_scale"]))
        elif "checkpoint_stall_seconds" in row:
            self.stalls.append((step, row["checkpoint_stall_seconds"]))
        elif "checkpoint_seconds" in row:
            self.saves.append((step, row["checkpoint_seconds"]))


class History:
    """The record, events, metrics, heartbeats and state of one run.

    Args:
        run_dir: The run folder.
        newest: Bytes of metrics.jsonl to read, counted from its end; None reads all of it.

    Raises:
        RunDirError: run.yaml is missing, damaged or of another version; or failure.json is
            damaged.
    """

    def __init__(self, run_dir: RunDir, *, newest: int | None = None) -> None:
        self.run_dir = run_dir
        self._newest = newest
        self._position = 0
        self._identity: tuple[int, ...] = ()
        self.refresh()

    def refresh(self) -> None:
        """Read what was appended since the last call.

        Everything is read again if metrics.jsonl was replaced, as a resumed run does.

        Raises:
            RunDirError: As for the constructor.
        """
        try:
            status = self.run_dir.metrics.stat()
        except OSError:
            status = None
        identity = () if status is None else (status.st_ino,)
        if identity != self._identity or (status and status.st_size < self._position):
            self._identity, self._position = identity, 0
        if self._position == 0:
            self.record: RunRecord = read_run(self.run_dir)
            self.plan = self.record.read_plan()
            self._lines = _Lines()
        if status is not None and status.st_size > self._position:
            self._read_appended()
        self.events = read_events(self.run_dir)
        self.failure = read_failure(self.run_dir)
        self.result = read_result(self.run_dir)
        self.health: list[Heartbeat] = list(read_heartbeats(self.run_dir))
        self.state: RunState = read_run_state(self.run_dir)

    def _read_appended(self) -> None:
        with self.run_dir.metrics.open("rb") as file:
            if self._position == 0 and self._newest is not None:
                self._position = max(file.seek(0, os.SEEK_END) - self._newest, 0)
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # the run is writing this line
                self._position += len(line)
                try:
                    self._lines.add(msgspec.json.decode(line))
                except (msgspec.DecodeError, TypeError, KeyError, AttributeError):
                    continue  # the run was killed while it wrote this line

    @property
    def steps(self) -> dict[str, array[float]]:
        """One column for each of `COLUMNS`, with one number per recorded step."""
        return self._lines.steps

    @property
    def evaluations(self) -> list[tuple[int, dict[str, float]]]:
        """The evaluations as pairs (step, metrics)."""
        return self._lines.evaluations

    @property
    def noise(self) -> list[tuple[int, float]]:
        """The measured gradient noise scales as pairs (step, noise scale)."""
        return self._lines.noise

    @property
    def ranks(self) -> list[RankShares]:
        """Times and memory of the ranks, one entry per line about them."""
        return self._lines.ranks

    @property
    def stalls(self) -> list[tuple[int, float]]:
        """The seconds that a step waited for a checkpoint, as pairs (step, seconds)."""
        return self._lines.stalls

    @property
    def saves(self) -> list[tuple[int, float]]:
        """The seconds until a checkpoint was on the disk, as pairs (step, seconds)."""
        return self._lines.saves

    @property
    def last_step(self) -> int:
        """The last recorded step; 0 if none is recorded."""
        column = self.steps["step"]
        return int(column[-1]) if column else 0

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.plan.total_steps

    def attempts(self) -> list[Attempt]:
        """Return the attempts of the run, in their order: it starts another when it resumes."""
        attempts: list[Attempt] = []
        for event in self.events:
            if event["event"] == "began":
                attempts.append(Attempt(began=event, ended=None, until=event["time"]))
            elif event["event"] in ("stopped", "failed", "finished") and attempts:
                attempts[-1].ended, attempts[-1].until = event, event["time"]
        if attempts and attempts[-1].ended is None and self.failure is not None:
            failed = {"event": "failed"} | self.failure.to_dict()
            attempts[-1].ended, attempts[-1].until = failed, self.failure.time
        times = self.steps["time"]
        ends = [*(later.began["time"] for later in attempts[1:]), math.inf]
        for attempt, end in zip(attempts, ends, strict=False):
            if attempt.ended is None:  # it continues, or was killed
                step_times = [time for time in times if attempt.began["time"] <= time < end]
                beats = [heartbeat.time for heartbeat in self.health if heartbeat.time < end]
                attempt.until = max([attempt.until, *step_times[-1:], *beats])
        return attempts

    def active_seconds(self) -> float | None:
        """Return the total duration of all attempts; None if none has begun."""
        attempts = self.attempts()
        if not attempts:
            return None
        return float(sum(max(attempt.until - attempt.began["time"], 0.0) for attempt in attempts))

    def flops_per_second(self) -> float | None:
        """Return the model FLOP/s of each rank, forward and backward; None if not counted.

        Backward takes twice the operations of forward. Activations that are computed again to save
        memory do not count, as in the model FLOPs utilisation of PaLM (Chowdhery et al., 2022,
        appendix B).
        """
        counts = [event["flops_per_sample"] for event in self.events if event["event"] == "counted"]
        throughput = self.typical("samples_per_second")
        if not counts or throughput is None:
            return None
        return 3 * float(counts[-1]) * throughput / self.plan.world_size

    def typical(self, name: str) -> float | None:
        """Return the median of the second half of a column; None if it holds no finite number."""
        column = self.steps[name]
        finite = sorted(value for value in column[len(column) // 2 :] if math.isfinite(value))
        return finite[len(finite) // 2] if finite else None


@dataclass(kw_only=True)
class Attempt:
    """One stretch of a run, from the start of its ranks to their end."""

    began: dict[str, Any]
    """The event `began`."""

    ended: dict[str, Any] | None
    """The event that ended the attempt; None if it continues, or was killed."""

    until: float
    """When the attempt ended, or last wrote a step or a heartbeat, in seconds since 1970."""


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
