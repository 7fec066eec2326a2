"""Start a prepared run: make or take its folder, launch its ranks, return its result."""

from __future__ import annotations

import contextlib
import functools
import os
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.console.echo import echo_if_possible
from launcher.console.explain import changed_lines, summarize
from launcher.console.progress import json_line
from launcher.errors import EXIT_USAGE, LauncherError, PeerError, RunDirError
from launcher.launch.health import refuse_unhealthy
from launcher.launch.launcher import launch
from launcher.launch.mirroring import Mirroring, upload_rest
from launcher.launch.multi_node import joined, make_run_dir_once
from launcher.launch.owned_folder import OwnedFolder
from launcher.launch.prepare import PreparedRun, RunRequest
from launcher.launch.restarts import RankStart, start_rounds
from launcher.launch.run_folder import in_folder
from launcher.launch.signal_handler import SignalHandler
from launcher.launch.split_check import check_layer_split
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.failure_record import RunFailedError
from launcher.runs.job import Job, ResumeFrom
from launcher.runs.run_result import RunResult, read_run_result
from launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from launcher.launch.multi_node import NodeGroup


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
    with contextlib.closing(Mirroring(request)) as mirroring, ExitStack() as ownership:
        folder = OwnedFolder(ownership, mirroring)
        launch_ranks = functools.partial(_launch, folder)
        if request.nodes is not None and request.max_restarts:
            return start_rounds(prepared, signals, folder, launch_ranks)
        with joined(request.nodes, prepared.plan, signals) as rendezvous:
            made = make_run_dir_once(rendezvous, lambda: folder.make(prepared))
            mirroring.attach(made)
            try:
                result = launch_ranks(in_folder(prepared, made, rendezvous), signals, rendezvous)
            except LauncherError as error:
                mirroring.finish(made, error.exit_code)
                raise
            return replace(result, exit_code=mirroring.finish(made, result.exit_code))


def _launch(
    folder: OwnedFolder,
    prepared: PreparedRun,
    signals: SignalHandler,
    rendezvous: NodeGroup | None,
    attempt: RankStart | None = None,
) -> RunResult:
    """Start the ranks of this machine and wait for them.

    Args:
        folder: The run folder.
        prepared: The run, with its folder.
        signals: Handles signals for the run.
        rendezvous: The launchers of the other nodes.
        attempt: Which start of the ranks it is, where several nodes restart together.
    """
    request, run_dir = prepared.request, prepared.run_dir
    assert run_dir is not None
    resume_from = prepared.resume_from
    if isinstance(request, RunRequest) and request.continues and list_checkpoints(run_dir):
        resume_from = ResumeFrom(fall_back=True, accept=request.accept)
    if attempt is not None and attempt.resumes:
        resume_from = ResumeFrom(fall_back=True, accept=request.accept)
    is_first = attempt is None or attempt.number == 0
    if is_first and (rendezvous is None or rendezvous.index == 0):
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
        restarts=request.max_restarts if attempt is None else 0,
        restarts_together=attempt is not None,
        attempt=0 if attempt is None else attempt.number,
        loss=None if attempt is None else attempt.loss,
        write_report=request.write_report,
        folder=prepared.folder,
    )
    examine = functools.partial(
        refuse_unhealthy, request.health, prepared.plan, run_dir, signals, rendezvous
    )
    try:
        examine(is_restart=attempt is not None and not attempt.is_first_here)
        exit_code = launch(
            job,
            signals=signals,
            rendezvous=rendezvous,
            watch=request.watch,
            before_restart=functools.partial(examine, is_restart=True),
            while_running=folder.mirroring.check,
        )
    except (RunFailedError, PeerError) as error:
        if error.exit_code == EXIT_USAGE and resume_from is not None and is_first:
            with contextlib.suppress(RunDirError):  # a full disk must not hide the failure
                folder.restore_record(run_dir)  # the ranks refused to resume
        raise
    result = read_run_result(run_dir, exit_code, signals.stopped_by)
    if rendezvous is not None:
        result = replace(result, exit_code=rendezvous.leave(exit_code))
    return result


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
