"""One run of a sweep, in a process of its own that starts the run's ranks.

The process is forked from that of the sweep, which has imported torch, unless the recipe has
started threads there; then it is a new interpreter. Whatever it prints goes to a log of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from launcher.console.echo import complain
from launcher.errors import EXIT_FAILED, EndedError, LauncherError
from launcher.forking import reason_not_to_fork, without_main_module
from launcher.launch.launcher import import_for
from launcher.launch.prepare import RunRequest, prepare_run
from launcher.launch.session import start
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.printable import shortened, traceback_of
from launcher.recipe.overrides import Override
from launcher.recipe.resolve import resolve
from launcher.runs.rundir import RunDir
from launcher.signals import STOP_SIGNALS, signals_blocked
from launcher.sweeps.shares import Share

_PR_SET_PDEATHSIG = 1
_MAX_ERROR = 4_000
"""Longest text of an error that is passed on, which a pipe takes without waiting."""


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """One run of a sweep, as it is handed to its process; it can be pickled."""

    recipe: str
    """Location of the recipe function."""

    overrides: tuple[Override, ...]
    """All values that the recipe is built with."""

    nproc_per_node: int | None
    """Ranks of the run; None is one for each GPU, or 2."""

    folder: Path
    """The run folder, which is made, or whose run continues."""

    log: Path
    """The file that receives what the process prints."""

    share: Share
    """The part of this machine that the run trains on."""

    pause_after: int | None
    """Steps after which the run stops with a checkpoint; None takes all."""

    parent: int
    """Process id of the sweep."""


class TrialProcess:
    """The process of one run of a sweep.

    Args:
        task: The run.
    """

    def __init__(self, task: TrialTask) -> None:
        self.task = task
        method = "fork" if reason_not_to_fork() is None else "spawn"
        context = multiprocessing.get_context(method)
        self._receiver, sender = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=run_trial, args=(task, sender), name=f"trial {task.folder.name}"
        )
        with without_main_module(), signals_blocked():
            self._process.start()
        sender.close()

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while the process runs, minus a signal's number if one killed it."""
        return self._process.exitcode

    @property
    def sentinel(self) -> int:
        """A descriptor that becomes readable when the process ends."""
        return self._process.sentinel

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it runs."""
        if self._process.pid is not None and self._process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def close(self) -> str:
        """Return the error of a process that has ended; empty if it reported none."""
        error = ""
        with contextlib.suppress(EOFError, OSError):
            if self._receiver.poll():
                error = str(self._receiver.recv())
        self._receiver.close()
        code = self._process.exitcode or 0
        if not error and code < 0:
            error = f"{signal.Signals(-code).name} ended the process of the run"
        return error


def preload(plans: Sequence[Plan]) -> None:
    """Import what the ranks need, so that every run finds it imported."""
    if reason_not_to_fork() is None:
        import_for(plans)


def run_trial(task: TrialTask, sender: Connection) -> None:
    """Train one run of a sweep and end this process with the exit code of the run."""
    _detach(task)
    code, error = EXIT_FAILED, ""
    try:
        signals = SignalHandler()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, *STOP_SIGNALS})
        _end_with(task.parent)
        request = RunRequest(
            reference=resolve(task.recipe),
            overrides=task.overrides,
            nproc_per_node=task.nproc_per_node,
            out=task.folder,
            continues=True,
            output_mode="quiet",
            pause_after=task.pause_after,
        )
        code = start(prepare_run(request), signals).exit_code
    except LauncherError as failure:
        code = failure.exit_code
        if not isinstance(failure, EndedError):
            error = str(failure)
            complain(error)
    except Exception as failure:  # noqa: BLE001  # the sweep goes on, and shows the error
        error = traceback_of(failure)
        complain(error)
    if error:
        with contextlib.suppress(OSError):
            sender.send(shortened(error, _MAX_ERROR))
    sys.exit(code)


def clear_unstarted(folder: Path) -> None:
    """Remove the folder of a run that was killed before it wrote run.yaml, so that it can start."""
    run_dir = RunDir(folder)
    if run_dir.run_yaml.exists() or not folder.is_dir():
        return
    with contextlib.suppress(OSError):  # whatever else is in it stays, and the run refuses it
        run_dir.owner.unlink(missing_ok=True)
        run_dir.log(0).parent.rmdir()
        folder.rmdir()


def _detach(task: TrialTask) -> None:
    """Leave the process group of the sweep, which passes signals on, and take the run's share."""
    os.setpgid(0, 0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    task.share.take()


def _end_with(parent: int) -> None:
    """Stop this run with a checkpoint when the process of the sweep ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before prctl took effect
        os.kill(os.getpid(), signal.SIGTERM)
