"""What evaluating the weights of a run came to, as a value for Python programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.json_file import read_json
from launcher.runs.files import write_json
from launcher.runs.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Loss and metrics of the weights of a run over its evaluation data."""

    run_dir: RunDir
    """The run folder."""

    weights: str
    """What holds the weights: `model.safetensors`, or the name of a checkpoint."""

    step: int
    """Optimizer steps that the weights were trained for."""

    ranks: int
    """The number of ranks that evaluated."""

    metrics: Mapping[str, float]
    """Loss and metrics by name."""

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as plain values for JSON."""
        return {
            "run_dir": str(self.run_dir.path),
            "weights": self.weights,
            "step": self.step,
            "ranks": self.ranks,
            "evaluation": dict(self.metrics),
        }


@dataclass(frozen=True)
class _Measured:
    metrics: dict[str, float | None]


def write_measured(run_dir: RunDir, metrics: Mapping[str, float]) -> None:
    """Write what the ranks measured to their own folder."""
    write_json(run_dir.evaluation, {"metrics": dict(metrics)})


def read_measured(run_dir: RunDir) -> dict[str, float]:
    """Return what `write_measured` wrote; a metric that is not finite is NaN."""
    metrics = read_json(run_dir.evaluation, _Measured).metrics
    return {name: math.nan if value is None else value for name, value in metrics.items()}
