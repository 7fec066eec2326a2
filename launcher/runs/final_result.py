"""result.json: what a finished run came to, written last."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import RunDirError
from launcher.json_file import Count, find_json
from launcher.runs.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class FinalResult:
    """The content of result.json. A metric is None if it is not finite."""

    evaluation: Mapping[str, float | None]
    """Metrics of the final evaluation; empty without evaluation data."""

    train_loss: float | None
    """Training loss of the last step."""

    steps: Count
    """Optimizer steps of the run."""

    num_trained: Count | None = None
    """Number of trained weights; None if an earlier version wrote the file."""

    @property
    def metrics(self) -> dict[str, float | None]:
        """The metrics of the evaluation or, without one, the training loss."""
        return dict(self.evaluation) or {"loss": self.train_loss}


def read_result(run_dir: RunDir) -> FinalResult | None:
    """Return the content of result.json, or None if it does not exist.

    Raises:
        RunDirError: result.json cannot be read or is damaged.
    """
    return find_json(run_dir.result, FinalResult)


def find_result(run_dir: RunDir) -> FinalResult | None:
    """Return the content of result.json, or None if it is missing or damaged."""
    with contextlib.suppress(RunDirError):
        return read_result(run_dir)
    return None
