"""From a request to a planned and checked run, before anything is written.

`launcher run` and `launcher.run` make a `RunRequest`, `launcher resume` and `launcher.resume` a
`ResumeRequest`; `launcher.launch.session` starts what is prepared here.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from launcher.console.explain import schedule_change
from launcher.environment.machine import read_machine
from launcher.environment.nodes import Nodes
from launcher.errors import CheckpointError, RunDirError
from launcher.launch.code_choice import choose_code, code_differences
from launcher.launch.health import HealthCheck
from launcher.launch.only_launcher import check_only_launcher
from launcher.planning.plan import Plan
from launcher.planning.timed_plan import timed_plan
from launcher.planning.weight_headers import read_weight_headers
from launcher.recipe.overrides import BuiltRecipe, Override, build
from launcher.recipe.recipe import Recipe
from launcher.recipe.resolve import Reference, resolve
from launcher.runs.best import best_evaluations
from launcher.runs.checkpoints import (
    Checkpoint,
    damage_error,
    find_checkpoint,
    list_checkpoints,
)
from launcher.runs.freezing import DEFAULT_LIMIT, CodeSnapshot, survey
from launcher.runs.job import OutputMode, ReportWriter, ResumeFrom
from launcher.runs.manifest import Manifest
from launcher.runs.mirror_record import read_mirror
from launcher.runs.ownership import check_unowned
from launcher.runs.plan_recipe import describe_run, plan_recipe
from launcher.runs.planned_steps import planned_steps
from launcher.runs.rebuilding import folder_of, overrides_of, working_folder
from launcher.runs.resumption import check_resumable, setting_changes
from launcher.runs.run_record import RunRecord, read_run
from launcher.runs.rundir import RunDir, open_run_dir


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a run and the resumption of a run have in common."""

    overrides: tuple[Override, ...] = ()
    """Values for the recipe, the weaker ones first."""

    nproc_per_node: int | None = None
    """Ranks on each node; None is one for each GPU, or as many as before when resuming."""

    nodes: Nodes | None = None
    """The machines of the run; None is this machine alone."""

    accept: tuple[str, ...] = ()
    """What may differ from the checkpoint: `data`, `missing-state`."""

    max_restarts: int = 0
    """How many times a failed run restarts from its newest checkpoint."""

    pause_after: int | None = None
    """Step after which the run stops with a checkpoint; None takes all steps."""

    output_mode: OutputMode = "progress"
    """What the run prints."""

    freezes: bool = True
    """Whether a run on several nodes imports a copy of its project, made in the run folder."""

    code_limit: int = DEFAULT_LIMIT
    """Megabytes that such a copy may have."""

    started: float = field(default_factory=time.monotonic)
    """`time.monotonic()` at the start of the command, from which `max_time` counts."""

    health: HealthCheck | None = None
    """Examines each node before its ranks start; None examines none."""

    mirror: str | None = None
    """URL at which the run is kept as well; None takes that of the run to resume, if it has one."""

    mirror_timeout: float = 300.0
    """Seconds for which uploads are tried without any success once the run has ended."""

    write_report: ReportWriter | None = None
    """Writes the HTML page that experiment trackers get at the end."""

    watch: Callable[[RunDir], object] | None = None
    """Called with the run folder many times a second while the ranks of this machine run; it must
    raise no exception."""


_R = TypeVar("_R", bound=Request)


@dataclass(frozen=True, kw_only=True)
class RunRequest(Request):
    """A request to train a recipe."""

    reference: Reference
    """The recipe."""

    out: Path | None = None
    """The run folder to make; None makes one below runs/."""

    in_process: bool = False
    """Whether the run takes place in this process, which then starts no other."""

    continues: bool = False
    """Whether a run that exists in `out` is resumed from its newest undamaged checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ResumeRequest(Request):
    """A request to resume a run from a checkpoint."""

    run_dir: Path
    """The run folder."""

    checkpoint: str | None = None
    """The checkpoint's name, such as 120; None is the newest."""

    fall_back: bool = False
    """Whether an older checkpoint is taken if this one is damaged."""

    allow_code_change: bool = False
    """Whether the project's present code is imported if it differs from that of the run."""


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that is planned and checked; nothing has been written."""

    request: Request
    reference: Reference
    plan: Plan
    overrides: tuple[Override, ...]
    """All that the recipe was built with."""

    description: RunRecord
    """The content of run.yaml."""

    run_dir: RunDir | None
    """The folder of a run to resume; None makes one."""

    resume_from: ResumeFrom | None = None
    changes: tuple[str, ...] = ()
    """What differs from the run before it was resumed, for its user."""

    snapshot: CodeSnapshot | None = None
    """The project that is copied into the run folder; None imports what `reference` says."""

    folder: Path | None = None
    """The working folder of the ranks; None is that of this process."""

    finished: str = ""
    """Why the run to resume takes no further step, and what would continue it; empty if it does."""

    @property
    def shown(self) -> str:
        """The run folder as text for its user; empty if it has not been made."""
        return "" if self.run_dir is None else self.run_dir.shown


def prepare_run(request: RunRequest, *, elsewhere: bool = False) -> PreparedRun:
    """Plan a run.

    Args:
        request: The request.
        elsewhere: Whether the nodes may have other numbers of GPUs than this machine.

    Raises:
        UsageError: The recipe, its overrides or the number of ranks are wrong, or torchrun started
            this command.
    """
    check_only_launcher(request.nodes)
    if request.continues and request.out is not None:
        request = _with_mirror(request, RunDir(request.out.resolve()))
    built, plan = _plan(
        request,
        request.reference,
        request.overrides,
        elsewhere=elsewhere,
        in_process=request.in_process,
    )
    if built.recipe.weights is not None:
        read_weight_headers(built.recipe.weights)  # refuses what cannot be read
    return PreparedRun(
        request=request,
        reference=request.reference,
        plan=plan,
        overrides=request.overrides,
        description=describe_run(request.reference, built, plan),
        run_dir=None,
        changes=_code_changes(request),
        snapshot=_survey(request, request.reference),
    )


def prepare_resume(request: ResumeRequest, *, elsewhere: bool = False) -> PreparedRun:
    """Plan the continuation of a run from one of its checkpoints.

    Args:
        request: The request.
        elsewhere: Whether the nodes may have other numbers of GPUs than this machine.

    Raises:
        UsageError: The folder, the checkpoint or the changed settings are wrong.
    """
    check_only_launcher(request.nodes)
    run_dir = open_run_dir(request.run_dir)
    check_unowned(run_dir.path)
    request = _with_mirror(request, run_dir)
    record = read_run(run_dir)
    checkpoint = _choose(run_dir, request.checkpoint, record)
    manifest = _read_manifest(run_dir, checkpoint, fall_back=request.fall_back)
    folder, previous = folder_of(record), overrides_of(record)
    chosen = choose_code(record, run_dir, allow_change=request.allow_code_change)
    overrides = (*previous, *request.overrides)
    with working_folder(folder):  # the recipe may read files by paths relative to it
        reference = resolve(chosen.recipe, chosen.code)
        nproc = request.nproc_per_node or record.nproc_per_node
        built, plan = _plan(
            replace(request, nproc_per_node=nproc), reference, overrides, elsewhere=elsewhere
        )
        if manifest is not None and (steps := planned_steps(run_dir, manifest, plan)) is not None:
            plan = timed_plan(plan, built.recipe, steps)
        previously_built = build(reference, previous)
        description = describe_run(reference, built, plan)
        snapshot = _survey(request, reference)
    if manifest is not None:
        check_resumable(manifest, plan, checkpoint.name, request.accept)
    return PreparedRun(
        request=request,
        reference=reference,
        plan=plan,
        overrides=overrides,
        description=description,
        run_dir=run_dir,
        resume_from=ResumeFrom(
            step=checkpoint.step,
            fall_back=request.fall_back,
            accept=request.accept,
            promotes=request.checkpoint is None,
        ),
        changes=(*_changes(manifest, record, previously_built, (built, plan)), *chosen.changes),
        snapshot=snapshot,
        folder=folder,
        finished=_why_finished(manifest, built.recipe, plan) if run_dir.result.exists() else "",
    )


def prepare_for(prepared: PreparedRun, nodes: int) -> PreparedRun:
    """Plan a prepared run for another number of nodes.

    Raises:
        UsageError: The recipe cannot be planned for that number.
    """
    if nodes == prepared.plan.nodes:
        return prepared
    samples = prepared.plan.train_samples
    with working_folder(prepared.folder or Path.cwd()):
        built, plan = plan_recipe(
            prepared.reference,
            prepared.overrides,
            read_machine(),
            nodes=nodes,
            nproc_per_node=prepared.plan.nproc_per_node,
            count=lambda counting: counting() if samples is None else samples,
        )
        description = describe_run(prepared.reference, built, plan)
    return replace(prepared, plan=plan, description=description)


def _with_mirror(request: _R, run_dir: RunDir) -> _R:
    """Return a request with the mirror of the run that it resumes, unless it names one.

    Raises:
        RunDirError: mirror.json is damaged.
    """
    if request.mirror is not None or (record := read_mirror(run_dir)) is None:
        return request
    return replace(request, mirror=record.url)


def _survey(request: Request, reference: Reference) -> CodeSnapshot | None:
    """Return the project that is copied into the run folder; None if none is.

    The first of several nodes copies it, and a run with a mirror, which another machine can resume.

    Raises:
        UsageError: It is too large.
    """
    nodes = request.nodes
    is_elsewhere = request.mirror is not None if nodes is None else nodes.index in (None, 0)
    return survey(reference, request.code_limit) if is_elsewhere and request.freezes else None


def _code_changes(request: RunRequest) -> tuple[str, ...]:
    """Return how the code of a run that `--continue` resumes differs from the present code."""
    if not request.continues or request.out is None or request.reference.code is not None:
        return ()
    with contextlib.suppress(RunDirError):  # opening the folder says what is wrong with it
        code = read_run(RunDir(request.out)).code
        if code is not None and (differences := code_differences(code)):
            return (f"code in {differences}",)
    return ()


def _why_finished(manifest: Manifest | None, recipe: Recipe, plan: Plan) -> str:
    """Return why a run with a result takes no further step, and what would continue it.

    The text is empty if it would take steps.
    """
    if manifest is None:
        return ""
    if manifest.step >= plan.total_steps:
        return (
            f"all {plan.total_steps:,} steps are taken. Larger epochs=... or steps=... would "
            "continue it"
        )
    best = best_evaluations(recipe, manifest.values.get("best"))
    if best is None or not best.has_ended:
        return ""
    return (
        f"it ended after step {manifest.step:,} of {plan.total_steps:,}, because "
        f"{best.num_without_improvement:,} evaluations had brought no better {best.metric.name}. "
        "A larger stop_after=... would continue it"
    )


def _plan(
    request: Request,
    reference: Reference,
    overrides: tuple[Override, ...],
    *,
    elsewhere: bool,
    in_process: bool = False,
) -> tuple[BuiltRecipe, Plan]:
    return plan_recipe(
        reference,
        overrides,
        read_machine(),
        nodes=request.nodes.count if request.nodes else 1,
        nproc_per_node=request.nproc_per_node,
        elsewhere=elsewhere,
        in_process=in_process,
    )


def _choose(run_dir: RunDir, name: str | None, record: RunRecord) -> Checkpoint:
    """Return the checkpoint called `name`, or the newest.

    Raises:
        CheckpointError: There is none.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise CheckpointError(
            f"{run_dir.shown} has no checkpoint. If it is of a run that ended before it saved one, "
            f"start the run again: its command was `{_command_of(record)}`, in {record.folder}."
        )
    return checkpoints[0] if name is None else find_checkpoint(run_dir, name)


def _command_of(record: RunRecord) -> str:
    """Return the command of a run without the folder and the interpreter of `launcher`."""
    words = list(record.command)
    if len(words) > 1 and Path(words[1]).name == "launcher":
        words = ["launcher", *words[2:]]
    return shlex.join(words)


def _read_manifest(run_dir: RunDir, checkpoint: Checkpoint, *, fall_back: bool) -> Manifest | None:
    """Return the manifest of a checkpoint; None if it is damaged and the ranks take an older one.

    Raises:
        CheckpointError: It is damaged, and no older one may be taken.
    """
    try:
        return checkpoint.read_manifest()
    except CheckpointError as error:
        older = [other for other in list_checkpoints(run_dir) if other.step < checkpoint.step]
        if not (fall_back and older):
            raise damage_error(checkpoint, str(error), older) from None
        return None


def _changes(
    manifest: Manifest | None,
    record: RunRecord,
    previously_built: BuiltRecipe,
    now: tuple[BuiltRecipe, Plan],
) -> tuple[str, ...]:
    """Return what differs from the run before.

    Args:
        manifest: The manifest of the checkpoint; None if it cannot be read.
        record: The content of run.yaml.
        previously_built: The recipe with the overrides in run.yaml.
        now: The recipe and the plan of the resumed run.
    """
    if manifest is None:
        return ()
    built, plan = now
    lines = setting_changes(manifest, plan)
    with contextlib.suppress(RunDirError):  # the plan of an earlier version of launcher
        before = record.read_plan(), previously_built.recipe.schedule
        change = schedule_change(manifest.step, before, (plan, built.recipe.schedule))
        if change and not plan.objectives:  # which have schedules of their own
            lines.append(change)
    return tuple(lines)
