"""A run from a request to its result: plan it, make its folder, start its ranks.

`launcher run`, `launcher resume` and their Python counterparts `launcher.run` and
`launcher.resume` build a request, prepare it and start what was prepared.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.console.echo import echo_if_possible
from launcher.console.explain import changed_lines, explain, schedule_change
from launcher.console.progress import json_line
from launcher.environment.machine import read_machine
from launcher.environment.nodes import Nodes
from launcher.errors import EXIT_USAGE, CheckpointError, RunDirError
from launcher.launch.launcher import launch
from launcher.launch.multi_node import check_restarts, joined, make_run_dir_once
from launcher.launch.run_folder import make_run_dir
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.recipe.overrides import BuiltRecipe, Override, build
from launcher.recipe.resolve import Reference, resolve
from launcher.runs.checkpoints import (
    Checkpoint,
    damage_error,
    find_checkpoint,
    list_checkpoints,
)
from launcher.runs.failure_record import RunFailedError
from launcher.runs.job import Job, OutputMode, ReportWriter, ResumeFrom, describe_run, plan_recipe
from launcher.runs.manifest import Manifest
from launcher.runs.ownership import check_unowned, own
from launcher.runs.resumption import changes, check_resumable
from launcher.runs.run_record import RunRecord, read_run, write_resumption
from launcher.runs.run_result import RunResult, read_run_result
from launcher.runs.rundir import RunDir, open_run_dir, write_atomic

if TYPE_CHECKING:
    from launcher.launch.multi_node import Rendezvous


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

    output_mode: OutputMode = "progress"
    """What the run prints."""

    write_report: ReportWriter | None = None
    """Writes the HTML page that experiment trackers get at the end."""


@dataclass(frozen=True, kw_only=True)
class RunRequest(Request):
    """A request to train a recipe."""

    reference: Reference
    """The recipe."""

    out: Path | None = None
    """The run folder to make; None makes one below runs/."""

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

    folder: Path | None = None
    """The working folder of the ranks; None is that of this process."""

    is_finished: bool = False
    """Whether all steps of the run to resume have been taken."""

    @property
    def shown(self) -> str:
        """The run folder as text for its user; empty if it has not been made."""
        return "" if self.run_dir is None else self.run_dir.shown


def prepare_run(request: RunRequest, *, elsewhere: bool = False) -> PreparedRun:
    """Plan a run.

    Args:
        request: What is asked for.
        elsewhere: Whether the nodes may have other numbers of GPUs than this machine.

    Raises:
        UsageError: The recipe, its overrides or the number of ranks are wrong.
    """
    check_restarts(request.nodes, request.max_restarts)
    built, plan = _plan(request, request.reference, request.overrides, elsewhere=elsewhere)
    return PreparedRun(
        request=request,
        reference=request.reference,
        plan=plan,
        overrides=request.overrides,
        description=describe_run(request.reference, built, plan),
        run_dir=None,
    )


def prepare_resume(request: ResumeRequest, *, elsewhere: bool = False) -> PreparedRun:
    """Plan the continuation of a run from one of its checkpoints.

    Args:
        request: What is asked for.
        elsewhere: Whether the nodes may have other numbers of GPUs than this machine.

    Raises:
        UsageError: The folder, the checkpoint or the changed settings are wrong.
    """
    check_restarts(request.nodes, request.max_restarts)
    run_dir = open_run_dir(request.run_dir)
    check_unowned(run_dir.path)
    record = read_run(run_dir)
    checkpoint = _choose(run_dir, request.checkpoint, record.recipe)
    folder = Path(record.folder) if Path(record.folder).is_dir() else Path.cwd()
    previous = tuple(
        Override(name=name, value=value, source="run.yaml")
        for name, value in record.overrides.items()
    )
    overrides = (*previous, *request.overrides)
    with _working_folder(folder):  # the recipe may read files by paths relative to it
        reference = resolve(record.recipe)
        nproc = request.nproc_per_node or record.nproc_per_node
        built, plan = _plan(
            replace(request, nproc_per_node=nproc), reference, overrides, elsewhere=elsewhere
        )
        previously_built = build(reference, previous)
        description = describe_run(reference, built, plan)
    manifest = _read_manifest(run_dir, checkpoint, fall_back=request.fall_back)
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
            step=checkpoint.step, fall_back=request.fall_back, accept=request.accept
        ),
        changes=_changes(manifest, record, previously_built, (built, plan)),
        folder=folder,
        is_finished=manifest is not None
        and manifest.step >= plan.total_steps
        and run_dir.result.exists(),
    )


def start(prepared: PreparedRun, signals: SignalHandler) -> RunResult:
    """Train what was prepared, on all of its nodes, until it finishes or is stopped.

    Raises:
        RunFailedError: A rank of this machine failed.
        PeerError: The run failed on another machine.
        EndedError: Another process reports why the run ended.
        RunDirError: The run folder cannot be made, or another process owns it.
    """
    request, run_dir = prepared.request, prepared.run_dir
    if prepared.is_finished and run_dir is not None:
        return read_run_result(run_dir)
    with ExitStack() as ownership, joined(request.nodes, prepared.plan) as rendezvous:
        previous_record: list[str] = []

        def make() -> RunDir:
            if isinstance(request, RunRequest):
                if request.continues and request.out is not None:
                    previous_record.extend(_text_of(request.out / "run.yaml"))
                return make_run_dir(
                    request.out,
                    prepared.plan.recipe,
                    prepared.description,
                    ownership,
                    continues=request.continues,
                    with_ranks=True,
                )
            assert run_dir is not None
            previous_record.extend(_text_of(run_dir.run_yaml))
            return _take_over(run_dir, prepared, ownership)

        prepared = replace(prepared, run_dir=make_run_dir_once(rendezvous, make))
        return _launch(prepared, signals, rendezvous, previous_record)


def _launch(
    prepared: PreparedRun,
    signals: SignalHandler,
    rendezvous: Rendezvous | None,
    previous_record: list[str],
) -> RunResult:
    request, run_dir = prepared.request, prepared.run_dir
    assert run_dir is not None
    resume_from = prepared.resume_from
    if isinstance(request, RunRequest) and request.continues and list_checkpoints(run_dir):
        resume_from = ResumeFrom(fall_back=True, accept=request.accept)
    if rendezvous is None or rendezvous.index == 0:
        _announce(prepared, run_dir)
    job = Job(
        recipe=prepared.reference.location,
        overrides=prepared.overrides,
        plan=prepared.plan,
        run_dir=run_dir,
        launcher_pid=os.getpid(),
        start=resume_from,
        output_mode=request.output_mode,
        restarts=request.max_restarts,
        write_report=request.write_report,
        folder=prepared.folder,
    )
    try:
        exit_code = launch(job, signals=signals, rendezvous=rendezvous)
    except RunFailedError as error:
        if error.exit_code == EXIT_USAGE and resume_from is not None and previous_record:
            write_atomic(run_dir.run_yaml, previous_record[0])  # the ranks refused to resume
        raise
    result = read_run_result(run_dir, exit_code, signals.stopped_by)
    if rendezvous is not None:
        result = replace(result, exit_code=rendezvous.leave(exit_code))
    return result


def _announce(prepared: PreparedRun, run_dir: RunDir) -> None:
    """Print the plan, and what differs from the run before, as the request asks."""
    mode = prepared.request.output_mode
    if mode == "progress":
        lines = [explain(prepared.plan, recipe=prepared.reference.shown)]
        echo_if_possible("\n".join([*lines, *changed_lines(prepared.changes)]))
    elif mode == "json":
        values = {"event": "planned", "run_dir": str(run_dir.path)}
        echo_if_possible(json_line(values | {"plan": prepared.plan.to_dict()}))


def _plan(
    request: Request,
    reference: Reference,
    overrides: tuple[Override, ...],
    *,
    elsewhere: bool,
) -> tuple[BuiltRecipe, Plan]:
    return plan_recipe(
        reference,
        overrides,
        read_machine(),
        nodes=request.nodes.count if request.nodes else 1,
        nproc_per_node=request.nproc_per_node,
        elsewhere=elsewhere,
    )


@contextlib.contextmanager
def _working_folder(folder: Path) -> Iterator[None]:
    """Work in a folder for the duration of the context."""
    previous = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(previous)


def _text_of(path: Path) -> list[str]:
    return [path.read_text(encoding="utf-8")] if path.is_file() else []


def _take_over(run_dir: RunDir, prepared: PreparedRun, ownership: ExitStack) -> RunDir:
    """Own the folder of a run to resume, and describe the resumption in it.

    Raises:
        CheckpointError: The chosen checkpoint has been removed since it was chosen.
    """
    ownership.enter_context(own(run_dir, with_ranks=True))
    assert prepared.resume_from is not None
    step = prepared.resume_from.step
    if not any(checkpoint.step == step for checkpoint in list_checkpoints(run_dir)):
        raise CheckpointError(
            f"{run_dir.shown} no longer has the checkpoint of step {step}: another process resumed "
            "the run while this one started. Repeat the command."
        )
    write_resumption(run_dir, prepared.description)
    return run_dir


def _choose(run_dir: RunDir, name: str | None, recipe: str) -> Checkpoint:
    """Return the checkpoint called `name`, or the newest.

    Raises:
        CheckpointError: There is none.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise CheckpointError(
            f"{run_dir.shown} has no checkpoint: the run ended before it saved one. Start it again "
            f"with `launcher run {recipe}`."
        )
    return checkpoints[0] if name is None else find_checkpoint(run_dir, name)


def _read_manifest(run_dir: RunDir, checkpoint: Checkpoint, *, fall_back: bool) -> Manifest | None:
    """Return the manifest of a checkpoint; None if it is damaged and the ranks take an older one.

    Raises:
        CheckpointError: It is damaged, and no older one may be taken.
    """
    try:
        return checkpoint.read_manifest()
    except CheckpointError as error:
        older = [each for each in list_checkpoints(run_dir) if each.step < checkpoint.step]
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
    lines = changes(manifest, plan)
    with contextlib.suppress(RunDirError):  # the plan of an earlier version of launcher
        before = record.read_plan(), previously_built.recipe.schedule
        if change := schedule_change(manifest.step, before, (plan, built.recipe.schedule)):
            lines.append(change)
    return tuple(lines)
