"""One rank's run: build, check, restore, train, and write the result."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from launcher.analysis.slow_ranks import SlowRanks, largest_share
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
from launcher.engine.training.best_weights import load_best_weights
from launcher.engine.training.build import build_context
from launcher.engine.training.callback_hooks import CallbackHooks
from launcher.engine.training.checkpoint_manager import CheckpointManager
from launcher.engine.training.context import StepController, TrainContext, TrainOutcome
from launcher.engine.training.early_end import evaluate_rest
from launcher.engine.training.loop import train
from launcher.engine.training.quick_saves import QuickSaves, open_quick_saves
from launcher.engine.training.resume_point import (
    ResumePoint,
    discard_later_steps,
    find_best,
    find_resume_point,
    keep_planned_steps,
    restore_callbacks,
    restore_state,
    stream_state_of,
)
from launcher.engine.training.time_budget import (
    SpeedMeasurement,
    TimeBudget,
    check_time_left,
    is_to_be_timed,
)
from launcher.errors import TrainingError, UsageError
from launcher.json_file import lines_of
from launcher.planning.plan import Plan
from launcher.printable import noted_text_of
from launcher.quantities import duration
from launcher.recipe.max_time import seconds_in
from launcher.recipe.recipe import Recipe
from launcher.regular_file import open_regular
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.events import record_event
from launcher.runs.files import write_json
from launcher.runs.final_result import BestResult
from launcher.runs.job import RecipeSource, ReportWriter, ResumeFrom
from launcher.runs.planned_steps import record_planned_steps
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

    total_seconds: float = 0.0
    """Time from the start of the command to the result, start-up and saving included."""

    max_seconds: float | None = None
    """The time that `max_time` gives, in seconds; None without it, and in a resumed run that keeps
    its number of steps."""

    num_trained: int
    """Number of trainable weights of the model."""

    weights_step: int
    """Number of steps after which the model had the weights in model.safetensors."""

    best: BestResult | None = None
    """The best evaluation; None without `keep_best`."""


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
    pause_after: int | None = None,
    trial: bool = True,
    source: RecipeSource | None = None,
    started: float | None = None,
    report_phase: Callable[[int, str], None] = lambda *_: None,
    write_report: ReportWriter | None = None,
    is_restart: bool = False,
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
        last_step: Number of steps after which to finish; None takes all planned steps, or those
            that fit in the recipe's `max_time`.
        pause_after: Number of steps after which to stop with a checkpoint; None does not stop.
        trial: Whether to check a few samples first, and refuse a run that would be wrong.
        source: What the recipe is built from; spawned DataLoader workers need it.
        started: `time.monotonic()` at the start of the command, on the machine of rank 0; None is
            the time of the call.
        report_phase: Called with (steps taken, phase) whenever this rank enters a phase.
        write_report: Writes the page that experiment trackers receive; None sends no page.
        is_restart: Whether the launcher starts the ranks again, because some were lost.

    Returns:
        The result, or None if the run was stopped before its end.

    Raises:
        LauncherError: The recipe or its data is at fault, the checkpoint cannot be resumed, or the
            training failed.
    """
    started = time.monotonic() if started is None else started
    resume_point = find_resume_point(start, backend, run_dir, plan)
    first_step = 0 if resume_point is None else resume_point.step
    plan = keep_planned_steps(plan, recipe, resume_point, backend, run_dir)
    best = None if stop is None else find_best(recipe, resume_point)
    has_ended = best is not None and best.has_ended  # it was interrupted before its result
    is_timed = last_step is None and stop is not None and is_to_be_timed(plan, first_step)
    last_step = first_step if has_ended else last_step or plan.total_steps
    context = build_context(
        recipe,
        plan,
        backend,
        first_step=first_step,
        last_step=last_step,
        recorded=None if resume_point is None else resume_point.evaluation,
        stream_state=stream_state_of(resume_point),
        is_restored=resume_point is not None,
        trial=trial,
        source=source,
        report_phase=report_phase,
    )
    initial_groups = group_values(context.optimizer)
    trial_outcome = _restore_and_try(context, recipe, resume_point, trial=trial)
    if is_timed:
        check_time_left(recipe, backend, started)
    quick, problems = _discard_past(context, run_dir, resume_point, stop, is_restart=is_restart)
    context = _record_start(context, run_dir, first_step)
    if context.data_watch is not None and context.data_watch.bad_samples is not None:
        context.data_watch.bad_samples.open(run_dir)
    hooks = CallbackHooks(context, run_dir, first_step)
    progress = output.progress(last_step) if backend.rank == 0 else None
    with _open_trackers(recipe, plan, backend, run_dir) as trackers:
        warnings = (*trial_outcome.warnings, *problems)
        recorder = _open_recorder(context, run_dir, progress, trackers, warnings)
        checkpoint_manager = budget = None
        if stop is not None:
            stop.defer()
            checkpoint_manager = CheckpointManager(
                context,
                stop,
                run_dir,
                groups=initial_groups,
                listener=recorder,
                data=trial_outcome.fingerprint,
                hooks=hooks,
                resumed_step=None if resume_point is None else first_step,
                pause_after=pause_after,
                best=best,
                quick=quick,
            )
            if is_timed and not has_ended:
                budget = TimeBudget(context, checkpoint_manager, recorder, started=started)
        restore_callbacks(resume_point, hooks)
        began = time.perf_counter()
        try:
            hooks.on_run_start()
            controller = budget or checkpoint_manager
            outcome = _take_steps(context, recorder, hooks, controller, first_step, last_step)
            if budget is not None and budget.measurement is not None:
                context, outcome = _take_timed_steps(
                    budget, budget.measurement, recorder, hooks, run_dir
                )
                last_step = context.plan.total_steps
            if checkpoint_manager is not None and checkpoint_manager.has_ended:
                outcome = evaluate_rest(context, outcome, hooks.listening(recorder))
            elif outcome.step < last_step:
                hooks.on_run_end(outcome.step, finished=False)
                _report_stop(backend, run_dir, outcome.step, progress)
                return None
            result = _complete(context, outcome, recorder, checkpoint_manager, run_dir, began)
            result = _with_times(result, started, recipe.max_time if is_timed else None)
            hooks.on_run_end(outcome.step, finished=True)
        finally:
            _close(checkpoint_manager, recorder)
        _report_result(result, run_dir, progress, trackers, write_report)
    return result


def _close(checkpoint_manager: CheckpointManager | None, recorder: Recorder) -> None:
    """Free the memory of checkpoints, and close the files of metrics."""
    if checkpoint_manager is not None:
        checkpoint_manager.free_host_memory()
    recorder.close()


def _with_times(result: TrainResult, started: float, max_time: str | None) -> TrainResult:
    """Return the result with the time since the start, and the time that the run was given."""
    return replace(
        result,
        total_seconds=time.monotonic() - started,
        max_seconds=None if max_time is None else seconds_in(max_time),
    )


def _restore_and_try(
    context: TrainContext, recipe: Recipe, resume_point: ResumePoint | None, *, trial: bool
) -> TrialOutcome:
    """Restore the state that a run resumes from, if it does, and try a few samples (collective)."""
    if resume_point is not None:
        restore_state(resume_point, context)
    if not trial:
        return TrialOutcome()
    step = 0 if resume_point is None else resume_point.step
    checkpoint_data = _get_checkpoint_data(resume_point)
    return run_trial(context, recipe, step=step, checkpoint_data=checkpoint_data)


def _discard_past(
    context: TrainContext,
    run_dir: RunDir,
    resume_point: ResumePoint | None,
    stop: StopRequest | None,
    *,
    is_restart: bool,
) -> tuple[QuickSaves | None, list[str]]:
    """Remove what does not lead to the resumed steps, and open the quick checkpoints (collective).

    From here on nothing refuses to resume. A new run is refused if its quick checkpoints have no
    place.

    Returns:
        The quick checkpoints, or None if there are none; and warnings for the user.

    Raises:
        RunDirError: The folder of quick checkpoints cannot be used for a new run.
    """
    backend, recipe = context.backend, context.recipe
    if resume_point is not None:
        discard_later_steps(resume_point, backend, run_dir)
    if stop is None:
        return None, []
    is_refused = resume_point is None and not is_restart
    return open_quick_saves(recipe, backend, run_dir, is_refused=is_refused)


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
    if plan.timed_steps is not None:
        record_planned_steps(run_dir, plan)
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


def _open_recorder(
    context: TrainContext,
    run_dir: RunDir,
    progress: Progress | None,
    trackers: Trackers | None,
    warnings: Iterable[str],
) -> Recorder:
    """Return what records the run, which has shown the warnings of the trial."""
    backend = context.backend
    records_samples = context.recipe.record_samples and backend.leads_group
    slow_ranks = SlowRanks(largest_share(backend.plan)) if progress else None
    recorder = Recorder(run_dir, backend.rank, records_samples, progress, trackers, slow_ranks)
    for warning in warnings:
        recorder.on_warning(warning)
    return recorder


def _take_steps(
    context: TrainContext,
    recorder: Recorder,
    hooks: CallbackHooks,
    controller: StepController | None,
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
            hooks.with_before_step(context),
            hooks.listening(recorder),
            controller,
            first_step=first_step,
            last_step=last_step,
        )
    except UsageError as error:
        if recorder.steps_taken is None:
            raise
        raise TrainingError(
            f"After step {recorder.steps_taken:,}: {noted_text_of(error)}"
        ) from None


def _take_timed_steps(
    budget: TimeBudget,
    measurement: SpeedMeasurement,
    recorder: Recorder,
    hooks: CallbackHooks,
    run_dir: RunDir,
) -> tuple[TrainContext, TrainOutcome]:
    """Take the further steps that fit in the recipe's `max_time`, and record them (collective).

    Returns:
        What was trained, with the plan of these steps, and where the training ended.

    Raises:
        TrainingError: The schedule of the recipe fails for this number of steps.
    """
    try:
        context = budget.planned(measurement)
    except UsageError as error:
        raise TrainingError(f"After step {recorder.steps_taken:,}: {error}") from None
    if context.backend.rank == 0:
        if problem := record_planned_steps(run_dir, context.plan):
            recorder.on_warning(problem)
        record_event(run_dir, "timed", **measurement.values())
        recorder.on_planned_steps(measurement.text(), measurement.values())
    steps = measurement.timed_steps
    outcome = _take_steps(context, recorder, hooks, budget.manager, steps.first_step, steps.steps)
    return context, outcome


def _complete(
    context: TrainContext,
    outcome: TrainOutcome,
    recorder: Recorder,
    checkpoint_manager: CheckpointManager | None,
    run_dir: RunDir,
    began: float,
) -> TrainResult:
    """Save the final checkpoint and weights of a run, and return its result (collective).

    With `keep_best` the weights are those of the best checkpoint.

    Args:
        context: What was trained.
        outcome: Where the training ended.
        recorder: Holds the loss of the last step, and whether this process has taken a step.
        checkpoint_manager: Saves the checkpoint; None saves none.
        run_dir: The run folder.
        began: `time.perf_counter()` at the first step.
    """
    backend = context.backend
    if checkpoint_manager is not None and recorder.steps_taken is not None:
        checkpoint_manager.save(outcome.step)
    # After the checkpoint, because a run that goes on from it has not averaged here.
    context.batch_norms.average(backend)
    context.report_phase(outcome.step, "finishing")
    seconds, weights_step = time.perf_counter() - began, outcome.step
    best = None if checkpoint_manager is None else checkpoint_manager.best
    if checkpoint_manager is not None:
        checkpoint_manager.finish()
        checkpoint_manager.free_host_memory()
    if best is not None:
        weights_step = load_best_weights(context, best, run_dir, outcome.step, recorder.on_warning)
    result = TrainResult(
        evaluation=outcome.evaluation,
        train_loss=recorder.last_loss,
        steps=outcome.step,
        samples=context.sampler.samples_before(outcome.step),
        seconds=seconds,
        num_trained=context.num_trained,
        weights_step=weights_step,
        best=None if best is None else best.result(),
    )
    context.report_phase(outcome.step, "finishing")
    weights = _final_weights(context)
    if backend.rank == 0:
        save_weights(weights, backend.weight_kinds(context.model), run_dir)
    for _ in weights:  # on other ranks, which take part in gathering
        pass
    return result


def _final_weights(context: TrainContext) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that evaluations are of, as `Backend.weights` does (collective)."""
    with context.evaluated_weights():
        yield from context.backend.weights(context.model)


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
    progress: Progress | None,
    trackers: Trackers | None,
    write_report: ReportWriter | None,
) -> None:
    """Write result.json, send the report to the trackers, and show a summary, on rank 0."""
    if progress is None:
        return
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
    best = "" if result.best is None else f"{result.best.summary(result.weights_step)}\n"
    budget = ""
    if result.max_seconds is not None:
        late = result.total_seconds - result.max_seconds
        over = f", {duration(late)} over" if late > 0 else ""
        used = duration(result.total_seconds)
        budget = (
            f"\n{used} from the start, of {duration(result.max_seconds)} that max_time gives{over}"
        )
    left_out = _left_out_text(run_dir)
    return (
        f"{held_out}{best}{result.steps:,} steps, {result.samples:,} samples in "
        f"{duration(result.seconds)}{budget}{left_out}\nrun folder: {run_dir.shown}"
    )


def _left_out_text(run_dir: RunDir) -> str:
    """Return a line about the samples that were left out; empty if there are none."""
    try:
        with io.BufferedReader(open_regular(run_dir.bad_samples)) as file:
            count = sum(1 for _ in lines_of(file))
    except OSError:
        return ""
    return f"\nsamples left out: {count:,}, listed in {run_dir.bad_samples.name}" if count else ""
