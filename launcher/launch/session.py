"""Start a prepared run: make or take its folder, launch its ranks, return its result."""

from __future__ import annotations

import contextlib
import functools
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.console.echo import echo_if_possible
from launcher.console.explain import changed_lines, summarize
from launcher.console.progress import json_line
from launcher.errors import EXIT_USAGE, CheckpointError, PeerError, RunDirError
from launcher.launch.health import refuse_unhealthy
from launcher.launch.launcher import launch
from launcher.launch.multi_node import joined, make_run_dir_once
from launcher.launch.prepare import PreparedRun, RunRequest
from launcher.launch.restarts import RankStart, start_rounds
from launcher.launch.run_folder import in_folder, open_run_folder
from launcher.launch.signal_handler import SignalHandler
from launcher.launch.split_check import check_layer_split
from launcher.recipe.resolve import Reference
from launcher.regular_file import read_regular
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.failure_record import RunFailedError
from launcher.runs.files import write_atomic
from launcher.runs.freezing import CodeSnapshot, freeze, place_of
from launcher.runs.job import Job, ResumeFrom
from launcher.runs.ownership import own_run_dir
from launcher.runs.run_record import (
    CodeRecord,
    replace_code,
    write_resumption,
)
from launcher.runs.run_result import RunResult, read_run_result
from launcher.runs.rundir import RunDir

_MAX_RECORD_BYTES = 1 << 24
"""Largest run.yaml that is restored if the ranks refuse to resume."""

if TYPE_CHECKING:
    from launcher.launch.multi_node import NodeGroup


def start(prepared: PreparedRun, signals: SignalHandler) -> RunResult:
    """Train what was prepared, on all of its nodes, until it finishes or is stopped.

    Raises:
        RunFailedError: A rank of this machine failed, or `tensor_parallel` cannot split the model.
        PeerError: The run failed on another machine.
        EndedError: Another process reports why the run ended.
        RunDirError: The run folder cannot be made, or another process owns it.
    """
    request, run_dir = prepared.request, prepared.run_dir
    if prepared.finished and run_dir is not None:
        return read_run_result(run_dir)
    check_layer_split(prepared, signals)
    with ExitStack() as ownership:
        folder = _Folder(ownership)
        if request.nodes is not None and request.max_restarts:
            return start_rounds(prepared, signals, folder, functools.partial(_launch, folder))
        with joined(request.nodes, prepared.plan) as rendezvous:
            made = make_run_dir_once(rendezvous, lambda: folder.make(prepared))
            return _launch(folder, in_folder(prepared, made, rendezvous), signals, rendezvous)


class _Folder:
    """The run folder, while this launcher owns it.

    Args:
        ownership: Ends the ownership when it is closed.
    """

    def __init__(self, ownership: ExitStack) -> None:
        self._ownership = ownership
        self._record: bytes | None = None
        """run.yaml before this launcher changed it."""

        self._is_owner = False

    def make(self, prepared: PreparedRun) -> RunDir:
        """Make the folder of a run, or take the one of a run to resume; freeze the project.

        Args:
            prepared: The run.

        Raises:
            RunDirError: The folder or the copy cannot be made, or another process owns it.
            CheckpointError: The chosen checkpoint has been removed since it was chosen.
        """
        request = prepared.request
        if isinstance(request, RunRequest):
            if request.continues and request.out is not None:
                self._record = _content_of(request.out / "run.yaml")
            made = open_run_folder(
                request.out,
                prepared.plan.recipe,
                prepared.description,
                self._ownership,
                continues=request.continues,
                with_ranks=True,
            )
        else:
            assert prepared.run_dir is not None
            self._record = _content_of(prepared.run_dir.run_yaml)
            made = _take_over(prepared.run_dir, prepared, self._ownership)
        self._is_owner = True
        if prepared.snapshot is not None:
            try:
                _freeze(prepared.reference, prepared.snapshot, made)
            except RunDirError:
                self.restore_record(made)  # a resumption that is refused leaves the run as it was
                raise
        return made

    def take_over(self, run_dir: RunDir) -> bool:
        """Own the folder, which another launcher has made; return whether it is newly owned.

        Raises:
            RunDirError: That launcher owns the folder after all.
        """
        if self._is_owner:
            return False
        own = own_run_dir(run_dir, with_ranks=True, takes_over=True)
        self._ownership.enter_context(own)
        self._is_owner = True
        return True

    def restore_record(self, run_dir: RunDir) -> None:
        """Write run.yaml as it was, if there was one.

        Raises:
            RunDirError: It cannot be written.
        """
        if self._record is not None:
            write_atomic(run_dir.run_yaml, self._record)


def _launch(
    folder: _Folder,
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


def _freeze(reference: Reference, snapshot: CodeSnapshot, run_dir: RunDir) -> None:
    """Copy the project of a recipe into the run folder, and say so in run.yaml.

    Raises:
        RunDirError: The copy cannot be written.
    """
    code = freeze(snapshot, run_dir.path)
    record = CodeRecord(project=str(code.project), files=snapshot.digests, copy=str(code.copy))
    replace_code(run_dir, place_of(reference, code), record)


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


def _content_of(path: Path) -> bytes | None:
    try:
        return read_regular(path, _MAX_RECORD_BYTES)
    except OSError:
        return None


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
