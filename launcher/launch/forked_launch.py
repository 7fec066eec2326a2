"""A launch in a process of its own, so that several run at the same time.

The process is forked from this one, which has imported what the ranks need.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess

from launcher.errors import EXIT_FAILED, LauncherError
from launcher.launch.launcher import launch
from launcher.launch.signal_handler import SignalHandler
from launcher.printable import traceback_of
from launcher.runs.job import Job
from launcher.signals import EXIT_BY_SIGNAL, STOP_SIGNALS, signals_blocked

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class LaunchOutcome:
    """What a launch came to."""

    exit_code: int
    """Exit code of the run; 0 if it finished."""

    error: str = ""
    """The post-mortem of a run that failed."""

    peak_bytes: int = 0
    """Largest resident memory of any of its processes, with what they share; 0 if unknown."""


class ForkedLaunch:
    """A launch in a process of its own, which ends with this one, however that ends.

    Killing the process, as a `SignalHandler` of this one does, lets it kill its ranks first.

    Args:
        job: The run. It saves no checkpoint when it is stopped.
    """

    def __init__(self, job: Job) -> None:
        receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
        self._receiver: Connection = receiver
        self._process = _LaunchingProcess(target=_launch, args=(job, os.getpid(), sender))
        with signals_blocked():  # until the process has handlers of its own
            self._process.start()
        sender.close()

    @property
    def signs(self) -> tuple[Connection, int]:
        """What becomes readable when the launch has ended, for `multiprocessing.connection.wait`.

        A process that the ranks have left running may hide the end of a killed one.
        """
        return self._receiver, self._process.sentinel

    @property
    def has_ended(self) -> bool:
        """Whether the outcome is known."""
        return self._receiver.poll() or self._process.exitcode is not None

    def end(self) -> LaunchOutcome:
        """Wait for the process to end, and return the outcome of the launch."""
        outcome: LaunchOutcome | None = None
        runs = self._process.exitcode is None  # before the look for what it has sent
        with contextlib.suppress(EOFError, OSError), self._receiver:
            if self._receiver.poll() or runs:
                outcome = self._receiver.recv()
        self._process.join()
        code = self._process.exitcode or 0
        if outcome is None and code < 0:
            text = f"{signal.Signals(-code).name} ended the process that had started the ranks."
            outcome = LaunchOutcome(exit_code=EXIT_BY_SIGNAL - code, error=text)
        return outcome or LaunchOutcome(exit_code=code or EXIT_FAILED)

    def kill(self) -> None:
        """Kill the ranks, and wait for the process to end."""
        self._process.kill()
        self._process.join()
        self._receiver.close()


class _LaunchingProcess(ForkProcess):
    """A process that kills its ranks before it ends."""

    def kill(self) -> None:
        """Ask the process to kill its ranks and to end."""
        self.terminate()


def end_with(parent: int) -> None:
    """Send this process SIGTERM when its parent ends, however that ends.

    Args:
        parent: Process id of the parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before prctl took effect
        os.kill(os.getpid(), signal.SIGTERM)


def _launch(job: Job, parent: int, sender: Connection) -> None:
    """Run a job in this process, which its parent ends, and send the outcome."""
    signals = SignalHandler(saves=False, reports=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, *STOP_SIGNALS})
    end_with(parent)
    code, text = EXIT_FAILED, ""
    try:
        code = launch(replace(job, launcher_pid=os.getpid()), signals=signals)
    except LauncherError as error:
        code, text = error.exit_code, str(error)
    except Exception as error:  # noqa: BLE001  # the other launches go on, and the parent shows it
        text = traceback_of(error)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    with contextlib.suppress(OSError):  # the parent is ending this process
        sender.send(LaunchOutcome(exit_code=code, error=text, peak_bytes=peak))
