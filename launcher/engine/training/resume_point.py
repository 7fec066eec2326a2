"""Find the checkpoint that a run resumes from, restore its state, discard what came later."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from launcher.engine.backends.base import Backend
from launcher.engine.data.streams import StreamState
from launcher.engine.saving.checkpoint_tensors import StoredState, load_newest
from launcher.engine.state.module_state import missing_extra_state
from launcher.engine.state.training_state import missing_optimizer_state, write_groups
from launcher.engine.training.callback_hooks import CallbackHooks
from launcher.engine.training.context import TrainContext
from launcher.engine.training.live_schedules import observe_evaluation
from launcher.engine.training.promotion import promote_newest
from launcher.errors import CheckpointError
from launcher.planning.plan import Plan
from launcher.planning.timed_plan import timed_plan
from launcher.recipe.recipe import Recipe
from launcher.runs.best import BestEvaluations, best_evaluations
from launcher.runs.checkpoints import Checkpoint, list_checkpoints, set_aside
from launcher.runs.events import record_past_failure
from launcher.runs.files import remove_file
from launcher.runs.history import read_evaluation
from launcher.runs.job import MISSING_STATE, ResumeFrom
from launcher.runs.manifest import Manifest
from launcher.runs.planned_steps import planned_steps
from launcher.runs.quick_checkpoints import forget_attempt
from launcher.runs.resumption import check_resumable
from launcher.runs.rundir import RunDir, truncate_after


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """The undamaged checkpoint that a run resumes from."""

    checkpoint: Checkpoint
    manifest: Manifest
    accept: tuple[str, ...] = ()
    """What the user accepts about the checkpoint: `data`, `missing-state`."""

    evaluation: dict[str, float] = field(default_factory=dict)
    """The metrics that the run has recorded after the checkpoint's last step, by name."""

    @property
    def step(self) -> int:
        """Number of steps taken before the checkpoint was saved."""
        return self.manifest.step


def find_resume_point(
    start: ResumeFrom | None, backend: Backend, run_dir: RunDir, plan: Plan
) -> ResumePoint | None:
    """Return the newest undamaged checkpoint that `start` allows (collective).

    A newer quick checkpoint on the nodes is first copied to the run folder.

    Args:
        start: Which checkpoint to resume from. None starts a new run: the function clears what a
            run that failed before its first checkpoint left in the folder, and returns None.
        backend: The ranks, which share the work of reading the checkpoint.
        run_dir: The run folder.
        plan: The plan of the resumed run.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged, or it belongs to a run with
            other settings.
    """
    if start is None:
        if backend.rank == 0:
            truncate_after(run_dir, 0)
            record_past_failure(run_dir)
        return None
    tell = functools.partial(_print_on_rank_0, backend)
    base = plan.settings.get("quick_checkpoints")
    start = promote_newest(start, base, backend, run_dir, tell)
    checkpoints = backend.broadcast(list_checkpoints(run_dir))
    candidates = [
        checkpoint
        for checkpoint in checkpoints
        if start.step is None or checkpoint.step <= start.step
    ]
    checkpoint, manifest = load_newest(candidates, backend, fall_back=start.fall_back, tell=tell)
    check_resumable(manifest, plan, checkpoint.name, start.accept)
    if backend.rank == 0:
        record_past_failure(run_dir)  # makes room for the record of a later failure
    evaluation = read_evaluation(run_dir, manifest.step) if backend.rank == 0 else {}
    return ResumePoint(
        checkpoint=checkpoint,
        manifest=manifest,
        accept=start.accept,
        evaluation=backend.broadcast(evaluation),
    )


def keep_planned_steps(
    plan: Plan, recipe: Recipe, resume_point: ResumePoint | None, backend: Backend, run_dir: RunDir
) -> Plan:
    """Return the plan with the steps that `max_time` has set before the run resumed (collective).

    Without `max_time`, and for a new run, it is returned as it is.
    """
    if recipe.max_time is None or resume_point is None or plan.timed_steps is not None:
        return plan
    found = backend.broadcast(planned_steps(run_dir, resume_point.manifest, plan))
    return plan if found is None else timed_plan(plan, recipe, found)


def find_best(recipe: Recipe, resume_point: ResumePoint | None) -> BestEvaluations | None:
    """Return the best evaluations up to where a run starts; None without `keep_best`."""
    if resume_point is None:
        return best_evaluations(recipe, None)
    best = best_evaluations(recipe, resume_point.manifest.values.get("best"))
    if best is not None and resume_point.evaluation:
        # The run may have been killed between an evaluation and the note of it in the checkpoint.
        best.add(resume_point.step, resume_point.evaluation)
    return best


def stream_state_of(resume_point: ResumePoint | None) -> StreamState | None:
    """Return where the stream of training data stood at the checkpoint; None if it was none.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    values: Any = None if resume_point is None else resume_point.manifest.values.get("stream")
    if resume_point is None or values is None:
        return None
    try:
        state = StreamState.from_json(values)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{resume_point.checkpoint.name}: the state of the stream in checkpoint.json is "
            "damaged. Resume from another checkpoint with --from."
        ) from None
    return state._replace(mark=None) if "data" in resume_point.accept else state


def restore_state(resume_point: ResumePoint, context: TrainContext) -> None:
    """Restore model, optimizer, loss scale and schedule from the checkpoint (collective).

    Raises:
        CheckpointError: The checkpoint belongs to another model, or lacks state that the user has
            not accepted to lose.
    """
    backend, values = context.backend, resume_point.manifest.values
    source = StoredState(resume_point.checkpoint, resume_point.manifest)
    module = backend.unwrap(context.model)
    missing = [
        *(
            f"the optimizer state of {name}"
            for name in missing_optimizer_state(source, module, context.optimizer)
        ),
        *(f"the extra state of {name}" for name in missing_extra_state(module, source)),
    ]
    if missing:
        _check_missing_state(resume_point, backend, missing)
    backend.restore(context.model, context.optimizer, source)
    write_groups(context.optimizer, values["groups"])
    if values["scaler"] is not None:
        states = [values["scaler"], *values.get("scalers", [])]
        for scaler, scaler_state in zip(backend.scalers, states, strict=False):
            scaler.restore(scaler_state)
    for plateau, state in zip(context.plateaus, values.get("plateaus", []), strict=False):
        plateau.restore(state)
    if resume_point.evaluation:  # which may have come after the checkpoint
        observe_evaluation(context.plateaus, backend, resume_point.step, resume_point.evaluation)
    _restore_averages(resume_point, context, source)


def _restore_averages(
    resume_point: ResumePoint, context: TrainContext, source: StoredState
) -> None:
    """Restore the averaged weights, or say that they begin anew or are dropped."""
    saved, remark = resume_point.manifest.values.get("averaging"), None
    if context.averages is not None:
        remark = context.averages.restore(source)
    elif saved is not None and saved["count"]:
        remark = f"its averages by {saved['averaging']} are dropped, because averaging is none"
    if remark is not None:
        _print_on_rank_0(context.backend, f"launcher: {resume_point.checkpoint.name}: {remark}.")


def restore_callbacks(resume_point: ResumePoint | None, hooks: CallbackHooks) -> None:
    """Restore the state of the recipe's callbacks from the checkpoint.

    A run saves its first checkpoint before an evaluation. If that evaluation has been recorded, it
    is not made again, and the callbacks are told of it here.
    """
    if resume_point is None or not hooks:
        return
    hooks.restore(resume_point.manifest.values.get("callbacks"), resume_point.checkpoint.name)
    if resume_point.evaluation and not hooks.has_seen_evaluation(resume_point.step):
        hooks.on_evaluation(resume_point.step, resume_point.evaluation)


def discard_later_steps(resume_point: ResumePoint, backend: Backend, run_dir: RunDir) -> None:
    """Remove from the run folder what was written after the checkpoint (collective).

    Later checkpoints are renamed, not deleted.
    """
    if backend.rank == 0:
        forget_attempt(run_dir)  # a kill in between must not let its later steps come back
        for checkpoint in list_checkpoints(run_dir):
            if checkpoint.step > resume_point.checkpoint.step:
                set_aside(checkpoint)
        truncate_after(run_dir, resume_point.checkpoint.step)
        remove_file(run_dir.result)
    backend.broadcast(None)
    _print_on_rank_0(backend, f"resumed from {resume_point.checkpoint.name}")


def _check_missing_state(resume_point: ResumePoint, backend: Backend, missing: list[str]) -> None:
    """Warn of state that the checkpoint lacks, or refuse it.

    Raises:
        CheckpointError: The user has not accepted missing state.
    """
    more = f" and {len(missing) - 1} more" if missing[1:] else ""
    problem = (
        f"{resume_point.checkpoint.name} lacks {missing[0]}{more}: the version of launcher that "
        "wrote it did not save that"
    )
    if MISSING_STATE not in resume_point.accept:
        raise CheckpointError(
            f"{problem}. Momentum and running averages would restart from zero, so the steps would "
            "differ from those of an uninterrupted run. Resume from an earlier checkpoint with "
            f"--from, or accept the difference with --accept {MISSING_STATE}."
        )
    _print_on_rank_0(backend, f"launcher: {problem}. This state restarts from its initial value.")


def _print_on_rank_0(backend: Backend, text: str) -> None:
    if backend.rank == 0:
        print(text, flush=True)
