"""Write what the loop measures to the run folder, and show it."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from launcher.analysis.gradient_noise import Measurement, RunningNoise
from launcher.analysis.slow_ranks import SlowRanks, slow_rank_text
from launcher.console.progress import Progress
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.metrics.rank_times import RankRow
from launcher.regular_file import open_to_append
from launcher.runs.files import unwritable_error
from launcher.runs.heartbeat import read_heartbeat
from launcher.runs.rundir import RunDir
from launcher.runs.step_row import ObjectivesRow, StepRow

if TYPE_CHECKING:
    from launcher.engine.metrics.trackers import Trackers

_ENCODER = msgspec.json.Encoder()
"""Ten times as fast as json.dumps, and called in every step; encodes NaN and infinity as null."""


class Recorder:
    """A `Listener` that writes metrics.jsonl (rank 0) and samples/ (every rank, if requested).

    Args:
        run_dir: The folder to write to.
        rank: The rank of this process.
        record_samples: Whether to write the sample ids of each step.
        progress: Shows the steps on rank 0; None on the other ranks, which write no metrics.
        trackers: Experiment trackers that receive the metrics as well, if any.
        slow_ranks: Finds ranks that the others wait for, of which it warns; None looks for none.

    Raises:
        RunDirError: The files cannot be made.
    """

    def __init__(
        self,
        run_dir: RunDir,
        rank: int,
        record_samples: bool,
        progress: Progress | None,
        trackers: Trackers | None = None,
        slow_ranks: SlowRanks | None = None,
    ) -> None:
        self._run_dir, self._slow_ranks = run_dir, slow_ranks
        self._progress, self._trackers = progress, trackers
        self._metrics = _open(run_dir.metrics) if progress else None
        self._samples = _open(run_dir.samples(rank)) if record_samples else None
        self._failed_files: list[BinaryIO] = []
        self.last_loss = math.nan
        self.steps_taken: int | None = None
        """Steps taken since the start of the run; None before this process has taken one."""

        self.data_wait_seconds = 0.0
        """Time that the steps of this process have waited for data, averaged over ranks."""

        self._noise = RunningNoise()
        self._logged: dict[str, float] = {}
        """The latest mean of each number that the recipe has logged."""

    def on_micro_batches(self, step: int, micro_batches: list[MicroBatch]) -> None:
        self.steps_taken = step
        if self._samples is not None:
            ids = [batch.request.indices for batch in micro_batches if batch.has_weight]
            self._write(self._samples, {"step": step, "micro_batches": ids})

    def on_steps(self, rows: list[StepRow]) -> None:
        for row in rows:
            self._write(self._metrics, row.flat())
            self._logged |= row.logged
        if rows:
            last = rows[-1]
            self.last_loss = last.loss
            self.data_wait_seconds += sum(row.data_wait_seconds for row in rows)
            if self._progress is not None:
                self._progress.show_step(
                    last.step, last.loss, last.lr, last.samples_per_second, self._logged
                )
            self._track(last.step, "train", _summarize(rows))
        self._flush()

    def on_noise(self, measurements: list[Measurement]) -> None:
        for measurement in measurements:
            scale = self._noise.add(measurement)
            self._write(self._metrics, {"step": measurement.step, "noise_scale": scale})
            self._track(measurement.step, "train", {"noise_scale": scale})

    def on_planned_steps(self, text: str, values: Mapping[str, Any]) -> None:
        """Receive the number of steps that `max_time` has set, on rank 0.

        Args:
            text: The number for people, one line.
            values: `step`, `steps`, `limit` and further values of the measurement.
        """
        if self._progress is not None:
            self._progress.set_steps(values["steps"], text, values)
        self.on_values(values["step"], {"total_steps": float(values["steps"])})

    def on_warning(self, text: str) -> None:
        if self._progress is not None:
            self._progress.show_line(f"launcher: {text}")

    def on_values(self, step: int, values: Mapping[str, Any]) -> None:
        self._write(self._metrics, {"step": step, **values})
        if isinstance(row := values.get("ranks"), RankRow):
            self._warn_of_slow_ranks(step, row)
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        if numbers:
            self._track(step, "train", numbers)

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        self._write(self._metrics, {"step": step, "evaluation": values})
        self._track(step, "evaluation", values)
        if self._progress is not None:
            self._progress.show_evaluation(step, values)
        self._flush()

    def close(self) -> None:
        """Close the files and restore the terminal."""
        for file in (self._metrics, self._samples):
            if file is not None:
                with self._dropping_on_error(file):
                    file.close()
        if self._progress is not None:
            self._progress.close()

    def _track(self, step: int, kind: str, values: Mapping[str, float | None]) -> None:
        if self._trackers is None:
            return
        self._trackers.log(step, {f"{kind}/{name}": value for name, value in values.items()})
        for text in self._trackers.warnings():
            self.on_warning(text)

    def _warn_of_slow_ranks(self, step: int, row: RankRow) -> None:
        if self._slow_ranks is None or row.own_seconds is None:
            return
        for slow in self._slow_ranks.add(step, row.own_seconds):
            heartbeat = read_heartbeat(self._run_dir, slow.rank)
            self.on_warning(slow_rank_text(slow, None if heartbeat is None else heartbeat.node))

    def _write(self, file: BinaryIO | None, values: Any) -> None:
        if file is not None and file not in self._failed_files:
            with self._dropping_on_error(file):
                file.write(_ENCODER.encode(values) + b"\n")

    def _flush(self) -> None:
        for file in (self._metrics, self._samples):
            if file is not None and file not in self._failed_files:
                with self._dropping_on_error(file):
                    file.flush()

    @contextlib.contextmanager
    def _dropping_on_error(self, file: BinaryIO) -> Iterator[None]:
        """Stop writing to a file after the first error, with a warning."""
        try:
            yield
        except OSError as error:
            self._failed_files.append(file)
            self.on_warning(
                f"cannot write {file.name}: {error.strerror}. The run continues without this file."
            )


def _summarize(rows: list[StepRow]) -> dict[str, float | None]:
    """Return the values for trackers: means of loss, data wait and what the recipe has logged.

    The rest is from the last row.

    Rows are read about twice a second, which is often enough for a curve; metrics.jsonl has every
    step.
    """
    last = rows[-1]
    names = dict.fromkeys(name for row in rows for name in row.logged)
    return {
        **{
            name: statistics.fmean(row.logged[name] for row in rows if name in row.logged)
            for name in names
        },
        "loss": statistics.fmean(row.loss for row in rows),
        "lr": last.lr,
        "momentum": last.momentum,
        "grad_norm": last.grad_norm,
        "epoch": float(last.epoch),
        "samples": float(last.samples),
        "samples_per_second": last.samples_per_second,
        "step_seconds": last.step_seconds,
        "data_wait_seconds": statistics.fmean(row.data_wait_seconds for row in rows),
        "communication_seconds": last.communication_seconds,
        **(last.numbers_of_turns() if isinstance(last, ObjectivesRow) else {}),
    }


def _open(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(exist_ok=True)
        return open_to_append(path)
    except OSError as error:
        raise unwritable_error(path, error) from None
