"""Start a prepared run: make or take its folder, launch its ranks, return its result."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.console.echo import echo_if_possible
from launcher.console.explain import changed_lines, summarize
from launcher.console.progress import json_line
from launcher.errors import EXIT_USAGE, CheckpointError, LauncherError, PeerError, RunDirError
from launcher.launch.health import refuse_unhealthy
from launcher.launch.launcher import launch
from launcher.launch.mirroring import Mirroring, upload_rest
from launcher.launch.multi_node import joined, make_run_dir_once
from launcher.launch.prepare import PreparedRun, RunRequest
from launcher.launch.run_folder import open_run_folder
from launcher.launch.signal_handler import SignalHandler
from launcher.launch.split_check import check_layer_split
from launcher.launch.typed_recipe import keep_recipe
from launcher.recipe.frozen_code import import_from
from launcher.recipe.resolve import Reference
from launcher.regular_file import read_regular
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.failure_record import RunFailedError
from launcher.runs.files import write_atomic
from launcher.runs.freezing import CodeSnapshot, freeze, open_frozen, place_of
from launcher.runs.job import Job, ResumeFrom
from launcher.runs.ownership import own_run_dir
from launcher.runs.run_record import CodeRecord, read_run, replace_code, write_resumption
from launcher.runs.run_result import RunResult, read_run_result
from launcher.runs.rundir import RunDir

_MAX_RECORD_BYTES = 1 << 24
"""Largest run.yaml that is restored if the ranks refuse to resume."""

if TYPE_CHECKING:
    from launcher.launch.multi_node import Rendezvous


def start(prepared: PreparedRun, signals: SignalHandler) -> RunResult:
    """Train what was prepared, on all of its nodes, until it finishes or is stopped.

    Raises:
        RunFailedError: A rank of this machine failed, or `tensor_parallel` cannot split the model.
        PeerError: The run failed on another machine.
        EndedError: Another process reports why the run ended.
        RunDirError: The run folder cannot be made, or another process owns it.
        StoreError: The mirror cannot be used.
    """
    request, run_dir = prepared.request, prepared.run_dir
    if prepared.finished and run_dir is not None:
        return replace(read_run_result(run_dir), exit_code=upload_rest(prepared))
    check_layer_split(prepared, signals)
    mirroring = Mirroring(request)
    with (
        contextlib.closing(mirroring),
        ExitStack() as ownership,
        joined(request.nodes, prepared.plan) as rendezvous,
    ):
        previous_record: list[bytes] = []

        def make() -> RunDir:
            if isinstance(request, RunRequest):
                if request.continues and request.out is not None:
                    previous_record.extend(_content_of(request.out / "run.yaml"))
                return open_run_folder(
                    request.out,
                    prepared.plan.recipe,
                    prepared.description,
                    ownership,
                    continues=request.continues,
                    with_ranks=True,
                )
            assert run_dir is not None
            previous_record.extend(_content_of(run_dir.run_yaml))
            return _take_over(run_dir, prepared, ownership)

        def make_and_freeze() -> RunDir:
            mirroring.open(_folder_to_resume(prepared))
            return _freeze_in(make(), prepared, previous_record)

        made = make_run_dir_once(rendezvous, make_and_freeze)
        reference = keep_recipe(prepared.reference, made)
        if rendezvous is not None or request.mirror is not None:
            reference = _frozen(reference, made)
        prepared = replace(prepared, run_dir=made, reference=reference)
        mirroring.attach(made)
        try:
            result = _launch(prepared, signals, rendezvous, previous_record, mirroring.check)
        except LauncherError as error:
            mirroring.finish(made, error.exit_code)
            raise
        return replace(result, exit_code=mirroring.finish(made, result.exit_code))


def _freeze_in(run_dir: RunDir, prepared: PreparedRun, previous_record: list[bytes]) -> RunDir:
    """Copy the project into a run folder if it is to be copied, and return the folder.

    Raises:
        RunDirError: The copy cannot be written.
    """
    if prepared.snapshot is None:
        return run_dir
    try:
        _freeze(prepared.reference, prepared.snapshot, run_dir)
    except RunDirError:
        if previous_record:  # a resumption that is refused leaves the run as it was
            write_atomic(run_dir.run_yaml, previous_record[0])
        raise
    return run_dir


def _folder_to_resume(prepared: PreparedRun) -> RunDir | None:
    """Return the folder of the run that a request resumes; None for a new run."""
    request = prepared.request
    if not isinstance(request, RunRequest):
        return prepared.run_dir
    return RunDir(request.out.resolve()) if request.continues and request.out else None


def _launch(
    prepared: PreparedRun,
    signals: SignalHandler,
    rendezvous: Rendezvous | None,
    previous_record: list[bytes],
    while_running: Callable[[], object],
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
        started=request.started,
        start=resume_from,
        pause_after=request.pause_after,
        output_mode=request.output_mode,
        restarts=request.max_restarts,
        write_report=request.write_report,
        folder=prepared.folder,
    )
    examine = functools.partial(
        refuse_unhealthy, request.health, prepared.plan, run_dir, signals, rendezvous
    )
    try:
        examine()
        exit_code = launch(
            job,
            signals=signals,
            rendezvous=rendezvous,
            watch=request.watch,
            before_restart=functools.partial(examine, is_restart=True),
            while_running=while_running,
        )
    except (RunFailedError, PeerError) as error:
        if error.exit_code == EXIT_USAGE and resume_from is not None and previous_record:
            with contextlib.suppress(RunDirError):  # a full disk must not hide the failure
                write_atomic(run_dir.run_yaml, previous_record[0])  # the ranks refused to resume
        raise
    result = read_run_result(run_dir, exit_code, signals.stopped_by)
    if rendezvous is not None:
        result = replace(result, exit_code=rendezvous.leave(exit_code))
    return result


def _freeze(reference: Reference, snapshot: CodeSnapshot, run_dir: RunDir) -> None:
    """Copy the project of a recipe into the run folder, and say so in run.yaml.

    Raises:
        RunDirError: The copy cannot be written.
    """
    code = freeze(snapshot, run_dir.path)
    record = CodeRecord(project=str(code.project), files=snapshot.digests, copy=str(code.copy))
    replace_code(run_dir, place_of(reference, code), record)


def _frozen(reference: Reference, run_dir: RunDir) -> Reference:
    """Return a recipe as the ranks of several nodes import it: from the copy of its project.

    Raises:
        RunDirError: This node does not see the copy.
    """
    record = read_run(run_dir)
    if reference.code is not None or record.code is None or record.code.copy is None:
        return reference
    code = open_frozen(Path(record.code.copy))
    import_from(code)
    return replace(reference, location=record.recipe, code=code)


def _announce(prepared: PreparedRun, run_dir: RunDir) -> None:
    """Print the plan, and what differs from the run before, as the request asks."""
    mode = prepared.request.output_mode
    if mode == "progress":
        resumed = prepared.resume_from is not None
        more = f"{run_dir.shown}/run.yaml has" if resumed else "`launcher plan` shows"
        recipe, more = prepared.reference.shown, f"{more} every number"
        lines = [summarize(prepared.plan, recipe=recipe, more=more)]
        echo_if_possible("\n".join([*lines, *changed_lines(prepared.changes)]))
    elif mode == "json":
        values = {"event": "planned", "run_dir": str(run_dir.path)}
        echo_if_possible(json_line(values | {"plan": prepared.plan.to_dict()}))


def _content_of(path: Path) -> list[bytes]:
    try:
        return [read_regular(path, _MAX_RECORD_BYTES)]
    except OSError:
        return []


def _take_over(run_dir: RunDir, prepared: PreparedRun, ownership: ExitStack) -> RunDir:
    """Own the folder of a run to resume, and describe the resumption in it.

    Raises:
        CheckpointError: The chosen checkpoint has been removed since it was chosen.
    """
    ownership.enter_context(own_run_dir(run_dir, with_ranks=True))
    assert prepared.resume_from is not None
    step = prepared.resume_from.step
    if not any(checkpoint.step == step for checkpoint in list_checkpoints(run_dir)):
        raise CheckpointError(
            f"{run_dir.shown} no longer has the checkpoint of step {step}: another process resumed "
            "the run while this one started. Repeat the command."
        )
    write_resumption(run_dir, prepared.description)
    return run_dir
