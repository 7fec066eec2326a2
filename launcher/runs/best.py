"""The best evaluations of a run by one metric: which checkpoints to keep, and when to end the run.

Each checkpoint holds the best evaluations up to its step, so that a resumed run goes on with them.
"""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from launcher.errors import CheckpointError
from launcher.recipe.evaluation_sets import metric_name
from launcher.recipe.keep_best import BestMetric, best_metric, unknown_metric_error
from launcher.recipe.recipe import Recipe
from launcher.runs.checkpoints import Checkpoint, list_checkpoints
from launcher.runs.final_result import BestResult
from launcher.runs.manifest import BestState, save_manifest
from launcher.runs.rundir import RunDir


class BestEvaluation(NamedTuple):
    """An evaluation that was among the best ones."""

    step: int
    """Optimizer steps taken before it."""

    value: float
    """The value of the metric."""


@dataclass(kw_only=True)
class BestEvaluations:
    """The best evaluations so far, equal on every rank."""

    keep_best: str
    """The recipe's `keep_best`."""

    num_kept: int
    """The recipe's `best_checkpoints`."""

    stop_after: int | None
    """The recipe's `stop_after`."""

    kept: list[BestEvaluation] = field(default_factory=list)
    """The best evaluations, the best first; among equal ones the earlier first."""

    step: int = 0
    """The step of the last evaluation that was taken into account."""

    num_without_improvement: int = 0
    """Evaluations since the best one."""

    @property
    def metric(self) -> BestMetric:
        """The metric by which evaluations are compared."""
        return best_metric(self.keep_best)

    @property
    def has_ended(self) -> bool:
        """Whether as many evaluations as `stop_after` have brought no improvement."""
        return self.stop_after is not None and self.num_without_improvement >= self.stop_after

    def add(self, step: int, values: Mapping[str, float]) -> bool:
        """Take an evaluation into account, and return whether it is among the best ones.

        Evaluations of other sets, and those up to the last step that was taken into account, change
        nothing. NaN is no improvement.

        Raises:
            RecipeError: The evaluation set of the metric was evaluated, but has no such metric.
        """
        metric = self.metric
        if metric.name not in values:
            own_set = metric.name.partition("/")[0]
            if "loss" in values or metric_name(own_set, "loss") in values:
                raise unknown_metric_error(self.keep_best, list(values))
            return False
        if step <= self.step:
            return False
        value, self.step = values[metric.name], step
        is_improvement = not math.isnan(value) and (
            not self.kept or metric.is_better(value, self.kept[0].value)
        )
        self.num_without_improvement = 0 if is_improvement else self.num_without_improvement + 1
        if math.isnan(value):
            return False
        sign = -1.0 if metric.mode == "max" else 1.0
        place = bisect.bisect_right(self.kept, sign * value, key=lambda each: sign * each.value)
        self.kept.insert(place, BestEvaluation(step, value))
        del self.kept[self.num_kept :]
        return place < self.num_kept

    def result(self) -> BestResult:
        """Return the best evaluation for result.json."""
        best = self.kept[0] if self.kept else None
        return BestResult(
            metric=self.metric.name,
            value=None if best is None else best.value,
            step=None if best is None else best.step,
            ended_after=self.num_without_improvement if self.has_ended else None,
        )

    def state(self) -> BestState:
        """Return the state for a checkpoint."""
        return {
            "keep_best": self.keep_best,
            "kept": [(step, value) for step, value in self.kept],
            "step": self.step,
            "num_without_improvement": self.num_without_improvement,
        }


def best_evaluations(recipe: Recipe, state: BestState | None) -> BestEvaluations | None:
    """Return the best evaluations of a run so far; None without `keep_best`.

    Args:
        recipe: The recipe.
        state: The state in the checkpoint from which the run is resumed; None for a new run. One
            of another metric is not used.
    """
    if recipe.keep_best is None:
        return None
    best = BestEvaluations(
        keep_best=recipe.keep_best, num_kept=recipe.best_checkpoints, stop_after=recipe.stop_after
    )
    if state is None or state["keep_best"] != recipe.keep_best:
        return best
    return replace(
        best,
        kept=[BestEvaluation(*each) for each in state["kept"][: best.num_kept]],
        step=state["step"],
        num_without_improvement=state["num_without_improvement"],
    )


def record_best(run_dir: RunDir, step: int, best: BestEvaluations) -> None:
    """Write the best evaluations into the checkpoint of `step`, which was saved before the last.

    Raises:
        CheckpointError: The checkpoint is damaged.
        RunDirError: checkpoint.json cannot be written.
    """
    for checkpoint in list_checkpoints(run_dir):
        if checkpoint.step == step:
            manifest = checkpoint.read_manifest()
            values = manifest.values.copy()
            values["best"] = best.state()
            save_manifest(checkpoint.path, replace(manifest, values=values))


def steps_to_keep(run_dir: RunDir, keep: int, best: BestEvaluations | None) -> set[int]:
    """Return the steps of the best checkpoints, now and as the `keep` newest checkpoints know them.

    A run that is resumed from one of these finds the best checkpoint of that time.
    """
    if best is None:
        return set()
    steps = {each.step for each in best.kept}
    for checkpoint in list_checkpoints(run_dir)[:keep]:
        with contextlib.suppress(CheckpointError):
            steps |= {step for step, _ in _kept_at(checkpoint)}
    return steps


def find_best_checkpoints(run_dir: RunDir) -> list[Checkpoint]:
    """Return the best checkpoints of a run with `keep_best` that are on the disk, the best first.

    Raises:
        CheckpointError: The newest checkpoint, which names them, is damaged.
    """
    checkpoints = list_checkpoints(run_dir)
    by_step = {checkpoint.step: checkpoint for checkpoint in checkpoints}
    kept = _kept_at(checkpoints[0]) if checkpoints else []
    return [by_step[step] for step, _ in kept if step in by_step]


def find_best_checkpoint(run_dir: RunDir) -> Checkpoint:
    """Return the best checkpoint of a run.

    Raises:
        CheckpointError: The run was trained without `keep_best`, has not been evaluated, or its
            newest checkpoint is damaged.
    """
    if found := find_best_checkpoints(run_dir):
        return found[0]
    names = ", ".join(checkpoint.name for checkpoint in list_checkpoints(run_dir))
    raise CheckpointError(
        f"{run_dir.shown} has no best checkpoint. A run keeps one with keep_best, such as "
        f"keep_best=accuracy:max, from its first evaluation on. Its checkpoints: {names or 'none'}."
    )


def _kept_at(checkpoint: Checkpoint) -> list[tuple[int, float]]:
    state = checkpoint.read_manifest().values.get("best")
    return [] if state is None else list(state["kept"])
