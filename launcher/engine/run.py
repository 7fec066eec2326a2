"""One rank of a run, from the world that it finds to the result."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from launcher.console.progress import Progress, metrics_text
from launcher.engine.backends import open_backend
from launcher.engine.backends.base import Backend
from launcher.engine.backends.placement import device_name
from launcher.engine.metrics.flops import CountedForward
from launcher.engine.metrics.recorder import Recorder
from launcher.engine.probes.data_identity import CheckpointData
from launcher.engine.probes.trial import TrialOutcome, run_trial
from launcher.engine.ranks.output import Output
from launcher.engine.saving.checkpoint_tensors import StoredState, load_newest
from launcher.engine.saving.final_weights import save_weights
from launcher.engine.state.compiled import is_compiled
from launcher.engine.state.module_state import lacks_extra_state
from launcher.engine.state.training_state import group_values, lost_state, write_groups
from launcher.engine.training.build import build_context
from launcher.engine.training.checkpoint_manager import CheckpointManager
from launcher.engine.training.loop import TrainContext, TrainOutcome, train
from launcher.environment.world import World
from launcher.errors import CheckpointError, LauncherError, TrainingError, UsageError, WorldError
from launcher.planning.plan import Plan
from launcher.quantities import duration
from launcher.recipe.recipe import Recipe
from launcher.runs.checkpoints import Checkpoint, list_checkpoints, set_aside
from launcher.runs.events import record_event, record_past_failure
from launcher.runs.job import MISSING_STATE, RecipeSource, ReportWriter, ResumeFrom
from launcher.runs.manifest import Manifest
from launcher.runs.resumption import check_resumable
from launcher.runs.run_record import read_run
from launcher.runs.rundir import RunDir, keep_until, write_json
from launcher.signals import StopRequest

if TYPE_CHECKING:
    from launcher.engine.metrics.trackers import Trackers


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run came to; result.json holds it."""

    evaluation: dict[str, float]
    """Loss and metrics over the evaluation data; empty where there is none."""

    train_loss: float
    """Loss of the last step."""

    steps: int
    samples: int
    """Training samples consumed."""

    seconds: float
    """From the first step to the last, evaluations included."""

    num_trained: int
    """Weights of the model that are trained."""


def join(
    recipe: Recipe, plan: Plan, world: World, make_run_dir: Callable[[], RunDir]
) -> tuple[Backend, RunDir]:
    """Form the group of ranks, make sure that they agree, and settle the run folder (collective).

    Args:
        recipe: What is trained.
        plan: This rank's plan.
        world: This process's place.
        make_run_dir: Called on rank 0 alone; every rank gets what it returns.

    Raises:
        WorldError: The world or the recipe is not the planned one, or ranks have different plans.
        LauncherError: What `make_run_dir` raised on rank 0.
    """
    plan.check_world(world)
    plan.check_recipe(recipe)
    torch.set_num_threads(plan.threads_per_rank)
    backend = open_backend(recipe, plan, world)
    told: dict[str, Any] = {}
    if world.rank == 0:
        try:
            told = {"plan": plan.agreement(), "run_dir": make_run_dir()}
        except LauncherError as error:
            told = {"error": error}
    told = backend.broadcast(told)
    if "error" in told:
        raise told["error"]
    different = plan.differences(told["plan"])
    if backend.any_rank(bool(different)):
        raise WorldError(next(filter(None, backend.gather(_disagreement(world, different)))))
    return backend, told["run_dir"]


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
    """Build what the recipe describes, train it, and write the result.

    Args:
        recipe: What to train.
        plan: How; its numbers are those of the recipe.
        backend: This rank among the others.
        run_dir: Where to write.
        output: Where to print.
        stop: Notes what asks this rank to stop; None saves no checkpoints and cannot be stopped.
        start: From which checkpoint to go on; None begins at the beginning.
        last_step: Steps to take; None is all that are planned.
        trial: Whether a few samples are looked at first, and a run that would be wrong is refused.
        source: What the recipe is built from; spawned DataLoader workers need it.
        report_phase: Is told how far this rank is: steps taken, and what comes next.
        write_report: Writes the page that experiment trackers get; None sends them none.

    Returns:
        The result; None where the run was asked to stop before its end.

    Raises:
        LauncherError: The recipe or its data is at fault, or the training failed.
    """
    found = _find(start, backend, run_dir, plan)
    first_step = 0 if found is None else found[1].step
    steps = plan.total_steps if last_step is None else last_step
    context = build_context(
        recipe,
        plan,
        backend,
        first_step=first_step,
        last_step=steps,
        trial=trial,
        source=source,
        report_phase=report_phase,
    )
    fresh = group_values(context.optimizer)
    if found is not None:
        _restore(context, *found, accept=() if start is None else start.accept)
    known = _known(start, found)
    tried = run_trial(context, recipe, step=first_step, known=known) if trial else TrialOutcome()
    if found is not None:  # nothing refuses to go on any more
        _go_back(backend, run_dir, found[0])
    context = _recorded(context, run_dir, first_step)
    progress = output.progress(steps) if backend.rank == 0 else None
    with _tracking(recipe, plan, backend, run_dir) as trackers:
        recorder = Recorder(run_dir, backend.rank, recipe.record_samples, progress, trackers)
        for text in tried.warnings:
            recorder.on_warning(text)
        checkpoint_manager = None
        if stop is not None:
            stop.defer()
            data = tried.fingerprint
            checkpoint_manager = CheckpointManager(
                context, stop, run_dir, groups=fresh, callback=recorder, data=data
            )
        started = time.perf_counter()
        try:
            trained = _take_steps(context, recorder, checkpoint_manager, first_step, steps)
            if trained.step < steps:
                _stop(backend, run_dir, trained.step, progress)
                return None
            context.norms.average(backend)
            if checkpoint_manager is not None and first_step < steps:
                checkpoint_manager.save(steps)
            weights = backend.weights(context.model)
            result = TrainResult(
                evaluation=trained.evaluation,
                train_loss=recorder.last_loss,
                steps=steps,
                samples=context.sampler.samples_before(steps),
                seconds=time.perf_counter() - started,
                num_trained=context.num_trained,
            )
            if checkpoint_manager is not None:
                checkpoint_manager.finish()
            if backend.rank == 0:
                save_weights(weights, run_dir)
        finally:
            recorder.close()
        if progress is not None:
            _finish(result, run_dir, progress, trackers, write_report)
    return result


def _take_steps(
    context: TrainContext,
    recorder: Recorder,
    checkpoint_manager: CheckpointManager | None,
    first_step: int,
    last_step: int,
) -> TrainOutcome:
    """Train from `first_step` to before `last_step`.

    Raises:
        UsageError: The recipe is at fault, and no step was taken.
        TrainingError: The training failed, or the recipe is at fault and steps were taken.
    """
    try:
        return train(
            context, recorder, checkpoint_manager, first_step=first_step, last_step=last_step
        )
    except UsageError as error:
        if recorder.steps_taken is None:
            raise
        raise TrainingError(f"After step {recorder.steps_taken:,}: {error}") from None


def _find(
    start: ResumeFrom | None, backend: Backend, run_dir: RunDir, plan: Plan
) -> tuple[Checkpoint, Manifest] | None:
    """Return the undamaged checkpoint to go on from (collective).

    None begins at the beginning, in a folder where a run may have failed before its first one.

    Raises:
        CheckpointError: There is none, it is damaged, or it is of another training.
    """
    if start is None:
        if backend.rank == 0:
            keep_until(run_dir, 0)
            record_past_failure(run_dir)
        return None
    there = backend.broadcast(list_checkpoints(run_dir))
    candidates = [each for each in there if start.step is None or each.step <= start.step]

    tell = functools.partial(_tell, backend)
    checkpoint, manifest = load_newest(candidates, backend, fall_back=start.fall_back, tell=tell)
    check_resumable(manifest, plan, checkpoint.name, start.accept)
    if backend.rank == 0:
        record_past_failure(run_dir)  # or another could not be recorded
    return checkpoint, manifest


def _go_back(backend: Backend, run_dir: RunDir, checkpoint: Checkpoint) -> None:
    """Put away what the run wrote after the checkpoint that it goes on from (collective)."""
    if backend.rank == 0:
        for later in list_checkpoints(run_dir):
            if later.step > checkpoint.step:
                set_aside(later)
        keep_until(run_dir, checkpoint.step)
        run_dir.result.unlink(missing_ok=True)
    backend.broadcast(None)
    _tell(backend, f"resumed from {checkpoint.name}")


def _known(
    start: ResumeFrom | None, found: tuple[Checkpoint, Manifest] | None
) -> CheckpointData | None:
    """Return what the checkpoint to go on from says of the data."""
    if start is None or found is None:
        return None
    checkpoint, manifest = found
    fingerprint = manifest.values.get("data")
    return CheckpointData(
        checkpoint=checkpoint.name, fingerprint=fingerprint, accepted="data" in start.accept
    )


def _recorded(context: TrainContext, run_dir: RunDir, step: int) -> TrainContext:
    """Record that the run begins after `step` steps; return what is trained, forward counted."""
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
    if is_compiled(context.model):  # what compiled code does is not seen
        return context

    def tell(flops: float) -> None:
        record_event(run_dir, "counted", flops_per_sample=flops)

    return replace(context, recipe=replace(recipe, forward=CountedForward(recipe.forward, tell)))


def _tracking(
    recipe: Recipe, plan: Plan, backend: Backend, run_dir: RunDir
) -> contextlib.AbstractContextManager[Trackers | None]:
    """Start the trackers that the recipe asks for, if it does, on rank 0."""
    if not recipe.trackers or backend.rank != 0:
        return contextlib.nullcontext()
    from launcher.engine.metrics.trackers import Trackers

    said = read_run(run_dir)
    facts = {name: getattr(plan, name) for name in ("world_size", "nodes", "total_steps", "lr")}
    parameters = {k: v for k, v in said.overrides.items() if k not in plan.settings}
    git = said.git.commit if said.git else ""
    config = {**plan.settings, **facts, **parameters, **said.versions, "git": git}
    return Trackers(recipe.trackers, run_dir, plan.recipe, config)


def _finish(
    result: TrainResult,
    run_dir: RunDir,
    progress: Progress,
    trackers: Trackers | None,
    write_report: ReportWriter | None,
) -> None:
    """Write the result, show it, and send a page to the trackers."""
    values = asdict(result)
    write_json(run_dir.result, values)
    record_event(run_dir, "finished", step=result.steps)
    summary = _summary(result, run_dir)
    if trackers is not None:
        if write_report is not None:
            trackers.attach(functools.partial(write_report, run_dir), summary)
        for text in trackers.close():
            progress.tell(f"launcher: {text}")
    progress.ended(summary, {"event": "finished"} | values | {"run_dir": str(run_dir.path)})


def _tell(backend: Backend, text: str) -> None:
    """Show the user a text, once."""
    if backend.rank == 0:
        print(text, flush=True)


def _restore(
    context: TrainContext, checkpoint: Checkpoint, manifest: Manifest, *, accept: tuple[str, ...]
) -> None:
    """Fill the trainee with what was saved (collective).

    Raises:
        CheckpointError: The checkpoint is of another model, or lacks state that it should hold.
    """
    backend, values = context.backend, manifest.values
    source = StoredState(checkpoint, manifest)
    module = backend.unwrap(context.model)
    lacking = [
        *(
            f"the optimizer state of {name}"
            for name in lost_state(source, module, context.optimizer)
        ),
        *(f"the extra state of {name}" for name in lacks_extra_state(module, source)),
    ]
    if lacking:
        _tell_lacking(backend, checkpoint, lacking, accepted=MISSING_STATE in accept)
    backend.restore(context.model, context.optimizer, source)
    write_groups(context.optimizer, values["groups"])
    if backend.scaler is not None and values["scaler"] is not None:
        backend.scaler.restore(values["scaler"])


def _tell_lacking(
    backend: Backend, checkpoint: Checkpoint, lacking: list[str], *, accepted: bool
) -> None:
    """Say what a checkpoint does not hold.

    Raises:
        CheckpointError: That is not accepted.
    """
    more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
    what = f"{checkpoint.name} lacks {lacking[0]}{more}, which the version that wrote it lost"
    if not accepted:
        raise CheckpointError(
            f"{what}. Resumed from here, momentum and running averages begin anew, and the steps "
            "are not those of a run that never stopped. Take an earlier checkpoint with --from, or "
            f"accept that with --accept {MISSING_STATE}."
        )
    _tell(backend, f"launcher: {what}: it begins anew")


def _stop(backend: Backend, run_dir: RunDir, step: int, progress: Progress | None) -> None:
    """Record that the run was stopped, and say how to go on with it (collective).

    Raises:
        TrainingError: There is no checkpoint to go on from.
    """
    left = backend.broadcast(list_checkpoints(run_dir))
    text = _resumable(step, left, run_dir)
    if progress is not None:
        record_event(run_dir, "stopped", step=step)
        values = {"event": "stopped", "step": step, "run_dir": str(run_dir.path)}
        progress.ended(text, values)


def _resumable(step: int, found: list[Checkpoint], run_dir: RunDir) -> str:
    """Return how to go on with a run that was asked to stop.

    Raises:
        TrainingError: There is no checkpoint to go on from.
    """
    if not found:
        raise TrainingError(
            f"Stopped after step {step:,}, and no checkpoint could be saved: there is nothing to "
            "go on from."
        )
    saved = found[0].step
    how = "with a checkpoint" if saved == step else f"with a checkpoint of step {saved:,}"
    return (
        f"launcher: stopped after step {step:,}, {how}. Go on with:\n"
        f"launcher resume {shlex.quote(run_dir.shown)}"
    )


def _disagreement(world: World, different: dict[str, tuple[Any, Any]]) -> str:
    if not different:
        return ""
    name, (own, rank_0) = next(iter(different.items()))
    return (
        f"Rank {world.rank} was started with {name}={own}, and rank 0 with {name}={rank_0}. "
        "Start every rank with the same recipe and the same overrides."
    )


def _summary(result: TrainResult, run_dir: RunDir) -> str:
    held_out = f"held-out: {metrics_text(result.evaluation)}\n" if result.evaluation else ""
    return (
        f"{held_out}{result.steps:,} steps, {result.samples:,} samples in "
        f"{duration(result.seconds)}\nrun folder: {run_dir.shown}"
    )
