"""Everything that a run has recorded so far, for tables, pages and the live view.

A `History` can be refreshed while the run continues: it then reads only what was appended.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
from array import array
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from launcher.errors import RunDirError
from launcher.json_file import Count, Moment, decode_line, lines_of
from launcher.recipe.max_time import seconds_in
from launcher.regular_file import open_regular
from launcher.runs.events import (
    QUICK,
    Began,
    Counted,
    Event,
    Failed,
    Finished,
    Recovered,
    Saved,
    Stopped,
    Timed,
    read_events,
)
from launcher.runs.failure_record import read_failure
from launcher.runs.final_result import find_result
from launcher.runs.heartbeat import Heartbeat, read_heartbeats
from launcher.runs.run_record import RunRecord, read_run
from launcher.runs.rundir import RunDir
from launcher.runs.status import RunState, read_run_state
from launcher.runs.step_row import LOGGED

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

    step: int = 0
    """The last of these steps."""

    own_seconds: list[float] | None = None
    """Seconds per step that each rank did not wait for other ranks; None if unknown."""

    device_seconds: list[float] | None = None
    """Seconds per step of each rank's own passes on its GPU; None if unknown."""

    data_wait_seconds: list[float]
    """Seconds per step that each rank waited for data."""

    memory_bytes: list[Count]
    """Peak memory of each rank."""

    def __post_init__(self) -> None:
        lists = (
            self.own_seconds,
            self.device_seconds,
            self.data_wait_seconds,
            self.memory_bytes,
        )
        if (
            not self.memory_bytes
            or len({len(values) for values in lists if values is not None}) > 1
        ):
            raise ValueError("expected one value for each rank")


class _Line(Struct, frozen=True, kw_only=True):
    """A line of metrics.jsonl: a step, an evaluation, or a measurement after a step."""

    step: Count
    samples: float | None = None
    time: Moment | None = None
    loss: float | None = None
    lr: float | None = None
    momentum: float | None = None
    grad_norm: float | None = None
    samples_per_second: float | UnsetType | None = UNSET
    step_seconds: float | None = None
    data_wait_seconds: float | None = None
    communication_seconds: float | None = None
    evaluation: dict[str, float | None] | None = None
    ranks: RankShares | None = None
    noise_scale: float | None = None
    checkpoint_stall_seconds: float | None = None
    checkpoint_seconds: float | None = None


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
    logged: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, line: _Line) -> None:
        step = line.step
        if line.samples_per_second is not UNSET:
            for name, column in self.steps.items():
                column.append(_number(getattr(line, name)))
        elif line.evaluation is not None:
            values = {name: _number(value) for name, value in line.evaluation.items()}
            self.evaluations.append((step, values))
        elif line.ranks is not None:
            self.ranks.append(replace(line.ranks, step=step))
        elif line.noise_scale is not None:
            self.noise.append((step, line.noise_scale))
        elif line.checkpoint_stall_seconds is not None:
            self.stalls.append((step, line.checkpoint_stall_seconds))
        elif line.checkpoint_seconds is not None:
            self.saves.append((step, line.checkpoint_seconds))

    def add_logged(self, content: bytes, step: int) -> None:
        """Add the numbers that the recipe has logged in a step, from the line of the step."""
        values = decode_line(content, _LOGGED_DECODER) or {}
        for key, value in values.items():
            if key.startswith(LOGGED) and (value is None or isinstance(value, (int, float))):
                pairs = self.logged.setdefault(key.removeprefix(LOGGED), [])
                pairs.append((step, _number(value)))


def read_evaluation(run_dir: RunDir, step: int) -> dict[str, float]:
    """Return the metrics that metrics.jsonl holds of an evaluation after `step` steps, by name."""
    values: dict[str, float | None] = {}
    with contextlib.suppress(OSError), io.BufferedReader(open_regular(run_dir.metrics)) as file:
        for text in lines_of(file):
            line = decode_line(text, _DECODER)
            if line is not None and line.step == step:
                values |= line.evaluation or {}
    return {name: _number(value) for name, value in values.items()}


def evaluation_set_names(metrics: Iterable[str]) -> list[str]:
    """Return the names of the evaluation sets that metrics belong to; none if there is one set.

    Every set has a loss, which is called `loss` if the set has no name.
    """
    names = list(metrics)
    losses = [name.partition("/") for name in names]
    return [] if "loss" in names else [each[0] for each in losses if each[1:] == ("/", "loss")]


def split_metric(name: str, sets: Container[str]) -> tuple[str, str]:
    """Return the evaluation set of a metric, or an empty text, and its name within the set.

    Args:
        name: A name such as `dev/accuracy`.
        sets: The names of the sets.
    """
    set_name, _, metric = name.partition("/")
    return (set_name, metric) if set_name in sets else ("", name)


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
        self._num_timed = 0
        self.refresh()

    def __repr__(self) -> str:
        return f"<History of {self.run_dir.shown}: {self.state.words}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows of this value."""
        from launcher.runs.rich_text import history_html

        return history_html(self)

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
        if status is not None and not stat.S_ISREG(status.st_mode):
            raise RunDirError(f"{self.run_dir.metrics} is damaged: it is not a regular file.")
        identity = () if status is None else (status.st_ino,)
        if identity != self._identity or (status and status.st_size < self._position):
            self._identity, self._position = identity, 0
        self.events: list[Event] = read_events(self.run_dir)
        num_timed = sum(isinstance(event, Timed) for event in self.events)
        if self._position == 0 or num_timed != self._num_timed:  # the plan has changed
            self.record: RunRecord = read_run(self.run_dir)
            self.plan = self.record.read_plan()
            self._num_timed = num_timed
        if self._position == 0:
            self._lines = _Lines()
        if status is not None and status.st_size > self._position:
            self._read_appended()
        self.failure = read_failure(self.run_dir)
        self.result = find_result(self.run_dir)
        self.health: list[Heartbeat] = list(read_heartbeats(self.run_dir))
        self.state: RunState = read_run_state(self.run_dir)

    def _read_appended(self) -> None:
        try:
            file = io.BufferedReader(open_regular(self.run_dir.metrics))
        except OSError as error:
            reason = error.strerror or error
            raise RunDirError(f"Cannot read {self.run_dir.metrics}: {reason}.") from None
        with file:
            if self._position == 0 and self._newest is not None:
                self._position = max(file.seek(0, os.SEEK_END) - self._newest, 0)
            file.seek(self._position)
            for line in lines_of(file):
                if not line.endswith(b"\n"):
                    break  # the run is writing this line
                self._position += len(line)
                # A run that was killed while it wrote a line has left half of it.
                if (decoded := decode_line(line, _DECODER)) is not None:
                    self._lines.add(decoded)
                    if _LOGGED_MARK in line:
                        self._lines.add_logged(line, decoded.step)

    @property
    def steps(self) -> dict[str, array[float]]:
        """One column for each of `COLUMNS`, with one number per recorded step."""
        return self._lines.steps

    @property
    def evaluations(self) -> list[tuple[int, dict[str, float]]]:
        """The evaluations as pairs (step, metrics)."""
        return self._lines.evaluations

    @property
    def latest_evaluation(self) -> dict[str, float]:
        """The latest value of each metric; empty before the first evaluation.

        Sets with schedules of their own are not always evaluated together.
        """
        latest: dict[str, float] = {}
        for _, values in self.evaluations:
            latest |= values
        return latest

    @property
    def noise(self) -> list[tuple[int, float]]:
        """The measured gradient noise scales as pairs (step, noise scale)."""
        return self._lines.noise

    @property
    def logged(self) -> dict[str, list[tuple[int, float]]]:
        """The numbers that the recipe has logged while it trained, by name, as pairs (step, mean).

        Steps in which a name was not logged are left out.
        """
        return self._lines.logged

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
    def checkpoints(self) -> list[Saved]:
        """The checkpoints that all attempts completed, in their order, with what they cost.

        Quick checkpoints are left out. Runs of earlier versions of launcher have none.
        """
        return [each for each in self.events if isinstance(each, Saved) and each.place != QUICK]

    @property
    def quick_checkpoints(self) -> list[Saved]:
        """The quick checkpoints that all attempts completed, in their order."""
        return [each for each in self.events if isinstance(each, Saved) and each.place == QUICK]

    @property
    def last_step(self) -> int:
        """The last recorded step; 0 if none is recorded."""
        column = self.steps["step"]
        return int(column[-1]) if column else 0

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.plan.total_steps

    @property
    def began(self) -> float | None:
        """When the ranks of the first attempt met, in seconds since 1970; None if they have not."""
        return next((event.time for event in self.events), None)

    @property
    def device_name(self) -> str:
        """Name of the device of the last attempt; empty if it is unknown."""
        starts = (event for event in reversed(self.events) if isinstance(event, Began))
        return next((start.device_name or "" for start in starts), "")

    def attempts(self) -> list[Attempt]:
        """Return the attempts of the run, in their order: it starts another when it resumes."""
        attempts: list[Attempt] = []
        for event in self.events:
            if isinstance(event, Began):
                attempts.append(Attempt(began=event, ended=None, until=event.time))
            elif isinstance(event, Recovered) and attempts:
                attempts[-1].recovered = event
            elif isinstance(event, (Stopped, Failed, Finished)) and attempts:
                attempts[-1].ended, attempts[-1].until = event, event.time
        if attempts and attempts[-1].ended is None and (failure := self.failure) is not None:
            failed = Failed(
                time=failure.time,
                rank=failure.rank,
                node=failure.node,
                error=failure.error,
                message=failure.message,
            )
            attempts[-1].ended, attempts[-1].until = failed, failure.time
        times = self.steps["time"]
        ends = [*(later.began.time for later in attempts[1:]), math.inf]
        for attempt, end in zip(attempts, ends, strict=False):
            if attempt.ended is None:  # it continues, or was killed
                step_times = [time for time in times if attempt.began.time <= time < end]
                beats = [heartbeat.time for heartbeat in self.health if heartbeat.time < end]
                attempt.until = max([attempt.until, *step_times[-1:], *beats])
        return attempts

    def active_seconds(self) -> float | None:
        """Return the total duration of all attempts; None if none has begun."""
        attempts = self.attempts()
        if not attempts:
            return None
        return float(sum(max(attempt.until - attempt.began.time, 0.0) for attempt in attempts))

    def time_used(self) -> tuple[float, float] | None:
        """Return the seconds that a run with `max_time` has used, and those that it has.

        Start-up counts in the attempt that measured the speed, where it is known.

        Returns:
            The two numbers, or None without `max_time` or before the run has begun.
        """
        max_time, used = self.plan.settings.get("max_time"), self.active_seconds()
        if not isinstance(max_time, str) or used is None:
            return None
        try:
            given = seconds_in(max_time)
        except ValueError:  # run.yaml is damaged
            return None
        timed = [event for event in self.events if isinstance(event, Timed)]
        if timed:
            began = [attempt.began.time for attempt in self.attempts()]
            last_began = max(filter(lambda time: time <= timed[-1].time, began), default=began[0])
            used += max(last_began - (timed[-1].time - timed[-1].used_seconds), 0.0)
        return used, given

    def flops_per_second(self) -> float | None:
        """Return the model FLOP/s of each rank, forward and backward; None if not counted.

        Backward takes twice the operations of forward. Activations that are computed again to save
        memory do not count, as in the model FLOPs utilisation of PaLM (Chowdhery et al., 2022,
        appendix B).
        """
        counts = [event.flops_per_sample for event in self.events if isinstance(event, Counted)]
        throughput = self.typical("samples_per_second")
        if not counts or throughput is None:
            return None
        return 3 * counts[-1] * throughput / self.plan.world_size

    def typical(self, name: str) -> float | None:
        """Return the median of the second half of a column; None if it holds no finite number."""
        column = self.steps[name]
        finite = sorted(value for value in column[len(column) // 2 :] if math.isfinite(value))
        return finite[len(finite) // 2] if finite else None


@dataclass(kw_only=True)
class Attempt:
    """One stretch of a run, from the start of its ranks to their end."""

    began: Began
    """The event with which it began."""

    recovered: Recovered | None = None
    """Its first step, if the launchers of several nodes had started the ranks again."""

    ended: Stopped | Failed | Finished | None
    """The event that ended the attempt; None if it continues, or was killed."""

    until: float
    """When the attempt ended, or last wrote a step or a heartbeat, in seconds since 1970."""


_DECODER = msgspec.json.Decoder(_Line)
_LOGGED_DECODER = msgspec.json.Decoder(dict[str, Any])
_LOGGED_MARK = f'"{LOGGED}'.encode()
"""What only lines with logged numbers have, nearly always."""


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
