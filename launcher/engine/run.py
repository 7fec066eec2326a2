"""One rank's run: build, check, restore, train, and write the result."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from launcher.console.progress import Progress, metrics_text
from launcher.engine.backends.base import Backend
from launcher.engine.backends.devices import device_name
from launcher.engine.metrics.flops import CountedForward
from launcher.engine.metrics.recorder import Recorder
from launcher.engine.probes.data_identity import CheckpointData
from launcher.engine.probes.trial import TrialOutcome, run_trial
from launcher.engine.ranks.output import Output
from launcher.engine.saving.final_weights import save_weights
from launcher.engine.state.compiled import is_compiled
from launcher.engine.state.training_state import group_values
from launcher.engine.training.build import build_context
from launcher.engine.training.checkpoint_manager import CheckpointManager
from launcher.engine.training.loop import TrainContext, TrainOutcome, train
from launcher.engine.training.resume_point import (
    ResumePoint,
    discard_later_steps,
    find_resume_point,
    restore_state,
)
from launcher.errors import TrainingError, UsageError
from launcher.planning.plan import Plan
from launcher.quantities import duration
from launcher.recipe.recipe import Recipe
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.events import record_event
from launcher.runs.files import write_json
from launcher.runs.job import RecipeSource, ReportWriter, ResumeFrom
from launcher.runs.run_record import read_run
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest

if TYPE_CHECKING:
    from launcher.engine.metrics.trackers import Trackers


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a finished run; result.json holds it."""

    evaluation: dict[str, float]
    """Loss and metrics over the evaluation data; empty if there is none."""

    train_loss: float
    """Loss of the last step."""

    steps: int
    """Number of optimizer steps."""

    samples: int
    """Number of training samples consumed."""

    seconds: float
    """Time from the first step to the end, evaluations included."""

    num_trained: int
    """Number of trainable weights of the model."""


def train_rank(
    recipe: Recipe,
    plan: Plan,
    backend: Backend,
    run_dir: RunDir,
    output: Output,
    *,
    stop: StopRequest | None = None,
    start: ResumeFrom | None = None,
    last_step: int | None = None,
    trial: bool = True,
    source: RecipeSource | None = None,
    report_phase: Callable[[int, str], None] = lambda *_: None,
    write_report: ReportWriter | None = None,
) -> TrainResult | None:
    """Build what the recipe describes, train it, and write the result (collective).

    Args:
        recipe: What to train.
        plan: The plan that was made for this recipe.
        backend: This rank among the others.
        run_dir: The run folder.
        output: Where to print.
        stop: Records the signals that ask this rank to stop. None saves no checkpoints, and the run
            cannot be stopped.
        start: Which checkpoint to resume from; None starts a new run.
        last_step: Number of steps after which to finish; None takes all planned steps.
        trial: Whether to check a few samples first, and refuse a run that would be wrong.
        source: What the recipe is built from; spawned DataLoader workers need it.
        report_phase: Called with (steps taken, phase) whenever this rank enters a phase.
        write_report: Writes the page that experiment trackers receive; None sends no page.

    Returns:
        The result, or None if the run was stopped before its end.

    Raises:
        LauncherError: The recipe or its data is at fault, the checkpoint cannot be resumed, or the
            training failed.
    """
    resume_point = find_resume_point(start, backend, run_dir, plan)
    first_step = 0 if resume_point is None else resume_point.step
    last_step = plan.total_steps if last_step is None else last_step
    context = build_context(
        recipe,
        plan,
        backend,
        first_step=first_step,
        last_step=last_step,
        evaluates_first=resume_point is not None and not resume_point.is_evaluated,
        is_restored=resume_point is not None,
        trial=trial,
        source=source,
        report_phase=report_phase,
    )
    initial_groups = group_values(context.optimizer)
    if resume_point is not None:
        restore_state(resume_point, context)
    trial_outcome = TrialOutcome()
    if trial:
        checkpoint_data = _get_checkpoint_data(resume_point)
        trial_outcome = run_trial(context, recipe, step=first_step, checkpoint_data=checkpoint_data)
    if resume_point is not None:  # from here on nothing refuses to resume
        discard_later_steps(resume_point, backend, run_dir)
    context = _record_start(context, run_dir, first_step)
    progress = output.progress(last_step) if backend.rank == 0 else None
    with _open_trackers(recipe, plan, backend, run_dir) as trackers:
        records_samples = recipe.record_samples and backend.leads_group
        recorder = Recorder(run_dir, backend.rank, records_samples, progress, trackers)
        for warning in trial_outcome.warnings:
            recorder.on_warning(warning)
        checkpoint_manager = None
        if stop is not None:
            stop.defer()
            checkpoint_manager = CheckpointManager(
                context,
                stop,
                run_dir,
                groups=initial_groups,
                callback=recorder,
                data=trial_outcome.fingerprint,
                resumed=resume_point is not None,
            )
        started = time.perf_counter()
        try:
            outcome = _take_steps(context, recorder, checkpoint_manager, first_step, last_step)
            if outcome.step < last_step:
                _report_stop(backend, run_dir, outcome.step, progress)
                return None
            result = _complete(context, outcome, recorder, checkpoint_manager, run_dir, started)
        finally:
            if checkpoint_manager is not None:
                checkpoint_manager.free_host_memory()
            recorder.close()
        if progress is not None:
            _report_result(result, run_dir, progress, trackers, write_report)
    return result


def _get_checkpoint_data(resume_point: ResumePoint | None) -> CheckpointData | None:
    """Return what the checkpoint says about the data of the run; None for a new run."""
    if resume_point is None:
        return None
    return CheckpointData(
        checkpoint=resume_point.checkpoint.name,
        fingerprint=resume_point.manifest.values.get("data"),
        accepted="data" in resume_point.accept,
    )


def _record_start(context: TrainContext, run_dir: RunDir, step: int) -> TrainContext:
    """Record the start of training after `step` steps, on rank 0.

    Returns:
        The context, on rank 0 with a `forward` that counts the operations of its first call.
    """
    plan, backend, recipe = context.plan, context.backend, context.recipe
    if backend.rank != 0:
        return context
    job = os.environ.get("SLURM_JOB_ID")
    record_event(
        run_dir,
        "began",
        step=step,
        ranks=plan.world_size,
        nodes=plan.nodes,
        strategy=plan.strategy,
        device_name=device_name(backend.device),
        **({} if job is None else {"job": job}),
    )
    # The operations of compiled code cannot be observed, nor those of other ranks, and with several
    # objectives backward is no multiple of forward.
    if is_compiled(context.model) or plan.tensor_parallel > 1 or recipe.objectives:
        return context

    def report(flops: float) -> None:
        record_event(run_dir, "counted", flops_per_sample=flops)

    return replace(context, recipe=replace(recipe, forward=CountedForward(recipe.forward, report)))


def _open_trackers(
    recipe: Recipe, plan: Plan, backend: Backend, run_dir: RunDir
) -> contextlib.AbstractContextManager[Trackers | None]:
    """Start the experiment trackers that the recipe asks for, on rank 0."""
    if not recipe.trackers or backend.rank != 0:
        return contextlib.nullcontext()
    from launcher.engine.metrics.trackers import Trackers

    record = read_run(run_dir)
    facts = {name: getattr(plan, name) for name in ("world_size", "nodes", "total_steps", "lr")}
    parameters = {k: v for k, v in record.overrides.items() if k not in plan.settings}
    git = record.git.commit if record.git else ""
    config = {**plan.settings, **facts, **parameters, **record.versions, "git": git}
    return Trackers(recipe.trackers, run_dir, plan.recipe, config)


def _take_steps(
    context: TrainContext,
    recorder: Recorder,
    checkpoint_manager: CheckpointManager | None,
    first_step: int,
    last_step: int,
) -> TrainOutcome:
    """Train from `first_step` up to, but not including, `last_step` (collective).

    Raises:
        UsageError: The recipe is at fault, and no step was taken.
        TrainingError: The training failed, or the recipe is at fault after some steps.
    """
    try:
        return train(
            context, recorder, checkpoint_manager, first_step=first_step, last_step=last_step
        )
    except UsageError as error:
        if recorder.steps_taken is None:
            raise
        raise TrainingError(f"After step {recorder.steps_taken:,}: {error}") from None


def _complete(
    context: TrainContext,
    outcome: TrainOutcome,
    recorder: Recorder,
    checkpoint_manager: CheckpointManager | None,
    run_dir: RunDir,
    started: float,
) -> TrainResult:
    """Save the final checkpoint and weights of a run, and return its result (collective).

    Args:
        context: What was trained.
        outcome: Where the training ended.
        recorder: Holds the loss of the last step, and whether this process has taken a step.
        checkpoint_manager: Saves the checkpoint; None saves none.
        run_dir: The run folder.
        started: `time.perf_counter()` at the first step.
    """
    backend = context.backend
    context.batch_norms.average(backend)
    if checkpoint_manager is not None and recorder.steps_taken is not None:
        checkpoint_manager.save(outcome.step)
    context.report_phase(outcome.step, "finishing")
    result = TrainResult(
        evaluation=outcome.evaluation,
        train_loss=recorder.last_loss,
        steps=outcome.step,
        samples=context.sampler.samples_before(outcome.step),
        seconds=time.perf_counter() - started,
        num_trained=context.num_trained,
    )
    if checkpoint_manager is not None:
        checkpoint_manager.finish()
        checkpoint_manager.free_host_memory()
    context.report_phase(outcome.step, "finishing")
    weights = backend.final_weights(context.model, context.optimizer)
    if backend.rank == 0:
        save_weights(weights, backend.weight_kinds(context.model), run_dir)
    for _ in weights:  # on other ranks, which take part in gathering
        pass
    return result


def _report_stop(backend: Backend, run_dir: RunDir, step: int, progress: Progress | None) -> None:
    """Record that the run was stopped after `step` steps, and show how to resume it (collective).

    Raises:
        TrainingError: There is no checkpoint to resume from.
    """
    checkpoints = backend.broadcast(list_checkpoints(run_dir))
    if not checkpoints:
        raise TrainingError(
            f"Stopped after step {step:,}, but no checkpoint could be saved, so the run cannot be "
            "resumed."
        )
    if progress is not None:
        record_event(run_dir, "stopped", step=step)
        saved = checkpoints[0].step
        how = "checkpoint saved" if saved == step else f"newest checkpoint at step {saved:,}"
        text = (
            f"launcher: stopped after step {step:,}, {how}. Resume with:\n"
            f"launcher resume {shlex.quote(run_dir.shown)}"
        )
        progress.show_result(text, {"event": "stopped", "step": step, "run_dir": str(run_dir.path)})


def _report_result(
    result: TrainResult,
    run_dir: RunDir,
    progress: Progress,
    trackers: Trackers | None,
    write_report: ReportWriter | None,
) -> None:
    """Write result.json, send the report to the trackers, and show a summary."""
    values = asdict(result)
    write_json(run_dir.result, values)
    record_event(run_dir, "finished", step=result.steps)
    summary = _summarize(result, run_dir)
    if trackers is not None:
        if write_report is not None:
            trackers.attach(functools.partial(write_report, run_dir), summary)
        for warning in trackers.close():
            progress.show_line(f"launcher: {warning}")
    progress.show_result(summary, {"event": "finished"} | values | {"run_dir": str(run_dir.path)})


def _summarize(result: TrainResult, run_dir: RunDir) -> str:
    held_out = f"held-out: {metrics_text(result.evaluation)}\n" if result.evaluation else ""
    return (
        f"{held_out}{result.steps:,} steps, {result.samples:,} samples in "
        f"{duration(result.seconds)}\nrun folder: {run_dir.shown}"
    )
