"""A run on several nodes that restarts: its launchers meet again when a rank or a node is lost."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from launcher.errors import (
    EXIT_FAILED,
    EXIT_RESUMABLE,
    EXIT_WITHOUT,
    EndedError,
    HealthError,
    LauncherError,
    PeerError,
    RunDirError,
)
from launcher.launch.launcher import import_for
from launcher.launch.multi_node import agreement_of, make_run_dir_once, report
from launcher.launch.owned_folder import OwnedFolder
from launcher.launch.prepare import PreparedRun, prepare_for
from launcher.launch.run_folder import in_folder
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.derivations import counted
from launcher.recipe.text_values import digits
from launcher.regular_file import open_to_append, read_regular
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.events import record_loss
from launcher.runs.failure_record import RunFailedError
from launcher.runs.files import remove_file, write_atomic
from launcher.runs.job import Loss
from launcher.runs.run_record import read_run, write_resumption
from launcher.runs.run_result import RunResult
from launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from launcher.engine.ranks.round_messages import End, Start
    from launcher.launch.multi_node import NodeGroup


@dataclass(frozen=True, kw_only=True)
class RankStart:
    """One start of the ranks of a run on several nodes."""

    number: int
    """How often they have been started before."""

    resumes: bool
    """Whether they resume from the newest checkpoint, whatever the request says."""

    is_first_here: bool
    """Whether the launcher of this node has not started any before."""

    loss: Loss | None
    """How the attempt before has ended."""


class StartRanks(Protocol):
    """Starts the ranks of this machine for one attempt, and waits for them."""

    def __call__(
        self,
        prepared: PreparedRun,
        signals: SignalHandler,
        group: NodeGroup | None,
        attempt: RankStart | None = None,
    ) -> RunResult: ...


def start_rounds(
    prepared: PreparedRun, signals: SignalHandler, folder: OwnedFolder, start_ranks: StartRanks
) -> RunResult:
    """Train until the run finishes, is stopped or may not restart again.

    Args:
        prepared: The run.
        signals: Handles signals for the run.
        folder: The run folder.
        start_ranks: Starts the ranks of this machine.

    Raises:
        RunFailedError: A rank of this machine failed, and the run does not restart.
        PeerError: The run has ended because of another machine.
        EndedError: Another launcher reports why the run has ended, or it goes on without this one.
        LauncherError: Nothing can be started on this machine.
    """
    import_for([prepared.plan])  # a spare is then ready at once
    rounds = _Rounds(prepared, signals, folder, start_ranks)
    try:
        return rounds.run()
    finally:
        rounds.close()


class _Rounds:
    """The rounds of a run, as one of its launchers goes through them."""

    def __init__(
        self,
        prepared: PreparedRun,
        signals: SignalHandler,
        folder: OwnedFolder,
        start_ranks: StartRanks,
    ) -> None:
        from launcher.engine.ranks.meeting import Meeting
        from launcher.engine.ranks.round_group import RoundStores

        nodes = prepared.request.nodes
        assert nodes is not None
        self._nodes, self._prepared, self._signals = nodes, prepared, signals
        self._folder, self._start_ranks, self._stores = folder, start_ranks, RoundStores(nodes)
        self._exit_code, self._has_started, self._is_over = EXIT_FAILED, False, False
        self._number = 0
        """The last round whose run folder this launcher has seen."""

        with signals.waiting_for_nodes():
            self._meeting = Meeting(
                nodes,
                agreement_of(prepared.plan),
                max_restarts=prepared.request.max_restarts,
                open_store=self._stores.open,
                newest=_newest_step,
                report=report,
            )

    def run(self) -> RunResult:
        """Take part in rounds until the run has ended.

        Raises:
            LauncherError: As `start_rounds` says.
        """
        from launcher.engine.ranks.meeting import MeetingEndedError

        failure: RunFailedError | None = None
        try:
            while True:
                start = self._meeting.next_round(lambda: self._signals.stopped_by is not None)
                try:
                    result = self._attempt(start)
                except RunFailedError as error:
                    failure = error
                except PeerError:
                    failure = None
                else:
                    self._is_over = True
                    self._exit_code = self._finish_mirror(result.exit_code)
                    return replace(result, exit_code=self._exit_code)
        except MeetingEndedError as ended:
            raise self._last_error(ended.end, failure) from None
        except HealthError as error:
            self._meeting.fail(error.exit_code, "health")
            if not self._nodes.names:
                raise
            report(f"launcher: {error}")
            raise EndedError(EXIT_WITHOUT) from None  # the others decide how the run ends
        except Exception as error:
            if isinstance(error, PeerError) and error.gone and self._meeting.folder is not None:
                error.exit_code = _exit_code_after_loss(Path(self._meeting.folder))
            self._exit_code = error.exit_code if isinstance(error, LauncherError) else EXIT_FAILED
            self._meeting.end(self._exit_code)
            raise

    def close(self) -> None:
        """Leave the meeting, and tell the batch script of a Slurm job how the run has ended.

        The exit code of srun tells the worst of all tasks, those on lost nodes included.
        """
        path, is_host = self._meeting.folder, self._meeting.is_host
        self._meeting.leave()
        self._stores.close()
        self._exit_code = self._finish_mirror(self._exit_code)
        if path is None or not is_host:
            return
        run_dir = RunDir(Path(path))
        with contextlib.suppress(RunDirError):
            check_round(run_dir, self._number)  # others may have gone on without this launcher
            if self._is_over:
                remove_file(run_dir.round)
            if "SLURM_JOB_ID" in os.environ:
                write_atomic(run_dir.exit_code, f"{self._exit_code}\n".encode())

    def _finish_mirror(self, exit_code: int) -> int:
        """Wait until everything is in the store of the run, if this launcher uploads to it."""
        path = self._meeting.folder
        return (
            exit_code
            if path is None
            else self._folder.mirroring.finish(RunDir(Path(path)), exit_code)
        )

    def _attempt(self, start: Start) -> RunResult:
        from launcher.engine.ranks.round_group import RoundGroup

        group = RoundGroup(self._meeting, start, self._stores)
        if start.loss is not None and self._meeting.is_host:
            self._tell(start)
        if self._meeting.folder is not None:  # run.yaml says where the copy of the project is
            folder = RunDir(Path(self._meeting.folder))
            self._prepared = in_folder(self._prepared, folder, group)
        prepared = prepare_for(self._prepared, start.count)
        made = make_run_dir_once(group, lambda: self._make(prepared, start))
        self._number = start.number
        self._prepared = in_folder(prepared, made, group)
        attempt = RankStart(
            number=start.number - 1,
            resumes=start.resumes,
            is_first_here=not self._has_started,
            loss=start.loss,
        )
        self._has_started = True
        return self._start_ranks(self._prepared, self._signals, group, attempt)

    def _make(self, prepared: PreparedRun, start: Start) -> RunDir:
        """Make the run folder, or own it and record how the round before has ended."""
        from launcher.engine.ranks.round_host import FAILURES_TO_LEAVE_OUT

        if self._meeting.folder is None:
            run_dir = self._folder.make(prepared)
            self._folder.mirroring.attach(run_dir)
        else:
            run_dir = RunDir(Path(self._meeting.folder))
            is_new_owner = self._folder.take_over(run_dir)
            check_round(run_dir, start.number - 1)
            if is_new_owner:
                self._folder.mirroring.attach(run_dir)
            if read_run(run_dir).plan.get("nodes") != prepared.plan.nodes:
                write_resumption(run_dir, prepared.description)
        write_atomic(run_dir.round, f"{start.number}\n".encode())
        if start.loss is not None:
            loss = start.loss
            record_loss(run_dir, loss, loss.index * prepared.plan.nproc_per_node)
            if start.roster.standing.failures.get(loss.node, 0) >= FAILURES_TO_LEAVE_OUT:
                with contextlib.suppress(OSError), open_to_append(run_dir.unhealthy_nodes) as file:
                    file.write(f"{loss.node}\n".encode())
        return run_dir

    def _tell(self, start: Start) -> None:
        loss, standing = start.loss, start.roster.standing
        assert loss is not None
        events = {
            "rank": "a rank has failed on {}",
            "node": "{} has disappeared",
            "health": "{} is not fit",
            "joined": "{} has joined",
        }
        event = events[loss.cause].format(loss.node)
        count = f"{standing.restarts} of {self._prepared.request.max_restarts}"
        of = "" if loss.cause == "joined" else f" (restart {count})"
        start_text = "from its newest checkpoint" if start.resumes else "from its beginning"
        report(
            f"launcher: {event}; the run goes on {start_text} on {counted(start.count, 'node')}{of}"
        )

    def _last_error(self, end: End, failure: RunFailedError | None) -> LauncherError:
        """Return the error with which this process ends, because the run has ended."""
        is_left_out = end.exit_code == EXIT_WITHOUT
        if end.reason and (self._meeting.has_held or not self._nodes.names or is_left_out):
            report(f"launcher: {end.reason}")
        if is_left_out:
            return EndedError(EXIT_WITHOUT)
        if failure is not None and end.node == self._meeting.name:
            self._exit_code = failure.exit_code
            return failure
        error = PeerError(end.node, end.exit_code)
        if error.gone and self._meeting.folder is not None:
            error.exit_code = _exit_code_after_loss(Path(self._meeting.folder))
        self._exit_code = error.exit_code
        is_quiet = bool(self._nodes.names) and not self._meeting.has_held
        return EndedError(error.exit_code) if is_quiet or not end.node else error


def check_round(run_dir: RunDir, number: int) -> None:
    """Check that the run has not gone on without this launcher, which was cut off from the others.

    Args:
        run_dir: The run folder, which this launcher owns.
        number: The last round that it knows of. The host of that round may have been lost before
            it wrote the number.

    Raises:
        RunDirError: A later round has started, or the run has ended.
    """
    try:
        found = digits(read_regular(run_dir.round, 64).decode().strip())
    except (OSError, ValueError):
        found = None
    if found is None or found > number:
        raise RunDirError(
            f"{run_dir.shown}: the run has gone on without this node, which had lost the "
            "connection to the others. Nothing was changed."
        )


def _newest_step(folder: str) -> int | None:
    checkpoints = list_checkpoints(RunDir(Path(folder)))
    return checkpoints[0].step if checkpoints else None


def _exit_code_after_loss(folder: Path) -> int:
    return EXIT_RESUMABLE if list_checkpoints(RunDir(folder)) else EXIT_FAILED
