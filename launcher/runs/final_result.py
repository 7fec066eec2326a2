"""result.json: what a finished run came to, written last."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import RunDirError
from launcher.json_file import Count, find_json
from launcher.quantities import measured
from launcher.runs.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class BestResult:
    """The best evaluation of a run with `keep_best`."""

    metric: str
    """The metric by which evaluations were compared, such as `dev/accuracy`."""

    value: float | None
    """Its best value; None if no evaluation gave a number."""

    step: Count | None
    """Optimizer steps taken before that evaluation; None if no evaluation gave a number."""

    ended_after: Count | None = None
    """Evaluations without improvement after which the run ended before its last step, as
    `stop_after` asks for; None if it took all of its steps."""

    def summary(self, weights_step: int) -> str:
        """Return the best evaluation and where the final weights are from, as text for people.

        Args:
            weights_step: The step after which the model had the weights in model.safetensors.
        """
        lines = []
        if self.ended_after is not None:
            count = f"{self.ended_after:,} evaluation{'s' * (self.ended_after != 1)}"
            lines.append(f"ended early: {count} without a better {self.metric}")
        if self.step is None or self.value is None:
            lines.append(f"best: none, because {self.metric} was never a number")
        else:
            lines.append(f"best: {self.metric} {measured(self.value)} at step {self.step:,}")
        lines[-1] += f"; model.safetensors has the weights of step {weights_step:,}"
        return "\n".join(lines)


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

    weights_step: Count | None = None
    """Steps after which the model had the weights in model.safetensors; None if an earlier version
    wrote the file."""

    best: BestResult | None = None
    """The best evaluation; None without `keep_best`."""

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
