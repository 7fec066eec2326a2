"""The weights of the best checkpoint, with which a run with `keep_best` ends."""

from __future__ import annotations

from collections.abc import Callable

from launcher.engine.saving.checkpoint_tensors import load_newest
from launcher.engine.training.context import TrainContext
from launcher.engine.training.resume_point import ResumePoint, restore_state
from launcher.errors import CheckpointError
from launcher.planning.strategy import STRATEGIES
from launcher.runs.best import BestEvaluations
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir


def load_best_weights(
    context: TrainContext,
    best: BestEvaluations,
    run_dir: RunDir,
    step: int,
    warn: Callable[[str], None],
) -> int:
    """Load the weights of the best checkpoint, after the last step of a run (collective).

    A best checkpoint that is missing or damaged is a warning, and the next best one is taken.

    Args:
        context: What was trained.
        best: The best evaluations.
        run_dir: The run folder.
        step: Number of steps taken.
        warn: Shows a warning to the user.

    Returns:
        The step after which the model had these weights.
    """
    backend = context.backend
    checkpoints = {each.step: each for each in backend.broadcast(list_checkpoints(run_dir))}
    for evaluation in best.kept:
        if evaluation.step == step:
            return step
        candidates = [checkpoints[evaluation.step]] if evaluation.step in checkpoints else []
        try:
            checkpoint, manifest = load_newest(candidates, backend, fall_back=False, tell=warn)
        except CheckpointError as error:
            warn(
                f"the checkpoint after step {evaluation.step:,}, with {best.metric.name} "
                f"{evaluation.value:.6g}, cannot be used: {error}"
            )
            continue
        if not STRATEGIES[context.plan.strategy].uses_deepspeed:
            context.optimizer.state.clear()  # makes room for the optimizer state that is read
        restore_state(ResumePoint(checkpoint=checkpoint, manifest=manifest), context)
        context.batch_norms.average(backend)
        return evaluation.step
    return step
