"""Writes what the loop measured into the run folder, and shows it."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from launcher.analysis.gradient_noise import Measurement, RunningNoise
from launcher.console.progress import Progress
from launcher.engine.data.reader import MicroBatch
from launcher.engine.metrics.meter import StepRow
from launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from launcher.engine.metrics.trackers import Trackers

_ENCODER = msgspec.json.Encoder()
"""Ten times as fast as json.dumps, in every step; what is not finite becomes null."""


class Recorder:
    """A listener that keeps metrics.jsonl (on rank 0) and samples/ (on every rank, if asked).

    Args:
        run_dir: Where to write.
        rank: This process's.
        record_samples: Whether to write sample ids.
        progress: Where to show the steps; None on all ranks but 0, which then write no metrics.
        trackers: Where to send them as well.
    """

    def __init__(
        self,
        run_dir: RunDir,
        rank: int,
        record_samples: bool,
        progress: Progress | None,
        trackers: Trackers | None = None,
    ) -> None:
        self._progress, self._trackers = progress, trackers
        self._metrics = run_dir.metrics.open("ab") if progress else None
        self._samples: BinaryIO | None = None
        if record_samples:
            path = run_dir.samples(rank)
            path.parent.mkdir(exist_ok=True)
            self._samples = path.open("ab")
        self._lost: list[BinaryIO] = []
        self.last_loss = math.nan
        self.steps_taken: int | None = None
        """Steps after the last one that was taken; None before the first."""

        self._noise = RunningNoise()

    def on_micro_batches(self, step: int, micro_batches: list[MicroBatch]) -> None:
        self.steps_taken = step
        if self._samples is not None:
            taken = [each.request.indices for each in micro_batches if each.counts]
            self._write(self._samples, {"step": step, "micro_batches": taken})

    def on_steps(self, rows: list[StepRow]) -> None:
        for row in rows:
            self._write(self._metrics, row)
        if rows:
            last = rows[-1]
            self.last_loss = last.loss
            if self._progress is not None:
                self._progress.stepped(last.step, last.loss, last.lr, last.samples_per_second)
            self._track(last.step, "train", _tracked(rows))
        self._flush()

    def on_noise(self, measurements: list[Measurement]) -> None:
        for measurement in measurements:
            scale = self._noise.add(measurement)
            self._write(self._metrics, {"step": measurement.step, "noise_scale": scale})
            self._track(measurement.step, "train", {"noise_scale": scale})

    def on_warning(self, text: str) -> None:
        if self._progress is not None:
            self._progress.tell(f"launcher: {text}")

    def on_note(self, step: int, values: Mapping[str, Any]) -> None:
        """Write what else happened after `step` steps."""
        self._write(self._metrics, {"step": step, **values})
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        if numbers:
            self._track(step, "train", numbers)

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        self._write(self._metrics, {"step": step, "evaluation": values})
        self._track(step, "evaluation", values)
        if self._progress is not None:
            self._progress.evaluated(step, values)
        self._flush()

    def close(self) -> None:
        """Close the files and leave the terminal as it was."""
        for file in (self._metrics, self._samples):
            if file is not None:
                with self._writing(file):
                    file.close()
        if self._progress is not None:
            self._progress.close()

    def _track(self, step: int, kind: str, values: Mapping[str, float | None]) -> None:
        if self._trackers is None:
            return
        self._trackers.log(step, {f"{kind}/{name}": value for name, value in values.items()})
        for text in self._trackers.warnings():
            self.on_warning(text)

    def _write(self, file: BinaryIO | None, values: Any) -> None:
        if file is not None and file not in self._lost:
            with self._writing(file):
                file.write(_ENCODER.encode(values) + b"\n")

    def _flush(self) -> None:
        for file in (self._metrics, self._samples):
            if file is not None and file not in self._lost:
                with self._writing(file):
                    file.flush()

    @contextlib.contextmanager
    def _writing(self, file: BinaryIO) -> Iterator[None]:
        """Go on without a file that cannot be written any more, and say so."""
        try:
            yield
        except OSError as error:
            self._lost.append(file)
            self.on_warning(
                f"cannot write {file.name}: {error.strerror}. The run goes on without it."
            )


def _tracked(rows: list[StepRow]) -> dict[str, float | None]:
    """Return what trackers are told of steps that were read together: of the last, the loss's mean.

    As often as a screen is drawn is often enough for a curve; metrics.jsonl has every step.
    """
    last = rows[-1]
    return {
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
    }
