"""Writes what the loop measured into the run folder, and shows it."""

from __future__ import annotations

import json
import math
from typing import Any, TextIO

from launcher.engine.metrics import StepRow
from launcher.engine.sampler import Sampler
from launcher.errors import TrainingError
from launcher.report.progress import Progress
from launcher.rundir import RunDir


class Recorder:
    """A listener that keeps metrics.jsonl (on rank 0) and samples/ (on every rank, if asked).

    Args:
        run_dir: Where to write.
        sampler: This rank's, for the sample ids.
        record_samples: Whether to write sample ids.
        progress: Where to show the steps; None on all ranks but 0, which then write no metrics.
    """

    def __init__(
        self, run_dir: RunDir, sampler: Sampler, record_samples: bool, progress: Progress | None
    ) -> None:
        self._sampler = sampler
        self._progress = progress
        self._metrics = run_dir.metrics.open("a", encoding="utf-8") if progress else None
        self._samples: TextIO | None = None
        if record_samples:
            path = run_dir.samples(sampler.rank)
            path.parent.mkdir(exist_ok=True)
            self._samples = path.open("a", encoding="utf-8")
        self.last_loss = math.nan

    def stepped(self, rows: list[StepRow]) -> None:
        for row in rows:
            self._write(self._metrics, row.to_dict())
            if self._samples is not None:
                self._write(self._samples, self._taken(row.step))
        if rows:
            last = rows[-1]
            self.last_loss = last.loss
            if self._progress is not None:
                self._progress.stepped(last.step, last.loss, last.lr, last.samples_per_second)
        self._flush()

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        self._write(self._metrics, {"step": step, "evaluation": values})
        if self._progress is not None:
            self._progress.evaluated(step, values)
        self._flush()

    def close(self) -> None:
        """Close the files and leave the terminal as it was."""
        for file in (self._metrics, self._samples):
            if file is not None:
                file.close()
        if self._progress is not None:
            self._progress.close()

    def _taken(self, step: int) -> dict[str, Any]:
        requests = self._sampler.training(step - 1)
        return {
            "step": step,
            "micro_batches": [request.indices for request in requests if request.counts],
        }

    def _write(self, file: TextIO | None, values: dict[str, Any]) -> None:
        if file is not None:
            file.write(json.dumps(values) + "\n")

    def _flush(self) -> None:
        for file in (self._metrics, self._samples):
            if file is not None:
                try:
                    file.flush()
                except OSError as error:
                    raise TrainingError(f"Cannot write {file.name}: {error.strerror}.") from None
