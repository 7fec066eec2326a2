"""What a run has written of itself, read as far as it has come, and further when it has gone on."""

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
"""What is kept of each step; nan where it was not finite, or is not known."""


@dataclass(frozen=True, kw_only=True)
class RankShares:
    """What metrics.jsonl says of the ranks, up to a step."""

    step: int
    own_seconds: list[float] | None
    data_wait_seconds: list[float]
    memory_bytes: list[int]


@dataclass(kw_only=True)
class _Lines:
    """What metrics.jsonl says."""

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
    """A run, by what is in its folder.

    Args:
        run_dir: The folder.
        newest: Bytes of metrics.jsonl to read, from its end; None reads all.

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
        """Read what has been added. A run that has gone back to a checkpoint is read anew."""
        metrics = self.run_dir.metrics
        try:
            found = metrics.stat()
        except OSError:
            found = None
        identity = () if found is None else (found.st_ino,)
        if identity != self._identity or (found and found.st_size < self._position):
            self._identity, self._position = identity, 0
        if self._position == 0:
            self.record: RunRecord = read_run(self.run_dir)
            self.plan = self.record.read_plan()
            self._lines = _Lines()
        if found is not None and found.st_size > self._position:
            self._read_on()
        self.events = read_events(self.run_dir)
        self.failure = read_failure(self.run_dir)
        self.result = read_result(self.run_dir)
        self.health: list[Heartbeat] = list(read_heartbeats(self.run_dir))
        self.state: RunState = read_run_state(self.run_dir)

    def _read_on(self) -> None:
        with self.run_dir.metrics.open("rb") as file:
            if self._position == 0 and self._newest is not None:
                self._position = max(file.seek(0, os.SEEK_END) - self._newest, 0)
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._position += len(line)
                try:
                    self._lines.add(msgspec.json.decode(line))
                except (msgspec.DecodeError, TypeError, KeyError, AttributeError):
                    continue  # cut off when the run ended

    @property
    def steps(self) -> dict[str, array[float]]:
        """A column for each of `COLUMNS`, of as many numbers as steps were written."""
        return self._lines.steps

    @property
    def evaluations(self) -> list[tuple[int, dict[str, float]]]:
        """(step, values) of each evaluation."""
        return self._lines.evaluations

    @property
    def noise(self) -> list[tuple[int, float]]:
        """(step, gradient noise scale), where it was measured."""
        return self._lines.noise

    @property
    def ranks(self) -> list[RankShares]:
        """What the ranks said of themselves."""
        return self._lines.ranks

    @property
    def stalls(self) -> list[tuple[int, float]]:
        """(step, seconds that it waited) for each checkpoint."""
        return self._lines.stalls

    @property
    def saves(self) -> list[tuple[int, float]]:
        """(step, seconds until it was on the disk) for each checkpoint."""
        return self._lines.saves

    @property
    def last_step(self) -> int:
        """Steps taken, as far as was written."""
        column = self.steps["step"]
        return int(column[-1]) if column else 0

    @property
    def total_steps(self) -> int:
        """Steps planned."""
        return self.plan.total_steps

    def attempts(self) -> list[Attempt]:
        """Return the stretches of time in which its ranks were at work, in their order."""
        found: list[Attempt] = []
        for event in self.events:
            if event["event"] == "began":
                found.append(Attempt(began=event, ended=None, until=event["time"]))
            elif event["event"] in ("stopped", "failed", "finished") and found:
                found[-1].ended, found[-1].until = event, event["time"]
        if found and found[-1].ended is None and self.failure is not None:
            failed = {"event": "failed"} | self.failure.to_dict()
            found[-1].ended, found[-1].until = failed, self.failure.time
        times = self.steps["time"]
        ends = [*(later.began["time"] for later in found[1:]), math.inf]
        for attempt, before in zip(found, ends, strict=False):
            if attempt.ended is None:  # without a word; or it goes on
                taken = [time for time in times if attempt.began["time"] <= time < before]
                seen = [each.time for each in self.health if each.time < before]
                attempt.until = max([attempt.until, *taken[-1:], *seen])
        return found

    def seconds_at_work(self) -> float | None:
        """Return how long its ranks were at work in all; None where it has not begun."""
        attempts = self.attempts()
        if not attempts:
            return None
        return float(sum(max(each.until - each.began["time"], 0.0) for each in attempts))

    def flops_per_second(self) -> float | None:
        """Return the operations a second of each rank, forward and backward; None if not counted.

        Backward takes twice those of forward; what is computed again for want of memory is left
        out: these are the model's, as in PaLM's definition of its utilisation (Chowdhery et al.,
        2022, appendix B).
        """
        counted = [each["flops_per_sample"] for each in self.events if each["event"] == "counted"]
        speed = self.typical("samples_per_second")
        if not counted or speed is None:
            return None
        return 3 * float(counted[-1]) * speed / self.plan.world_size

    def typical(self, name: str) -> float | None:
        """Return the median of a column over its second half; None where there is no number."""
        column = self.steps[name]
        known = sorted(value for value in column[len(column) // 2 :] if math.isfinite(value))
        return known[len(known) // 2] if known else None


@dataclass(kw_only=True)
class Attempt:
    """A stretch of time in which the ranks of a run were at work."""

    began: dict[str, Any]
    ended: dict[str, Any] | None
    """The event that ended it; None where it ended without a word, or goes on."""

    until: float
    """When it ended, or was last heard of, in seconds since 1970."""


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
