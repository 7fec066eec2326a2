"""Signals that reach the launching process while a run starts, trains and ends.

Slurm, terminals and people ask a run to stop with SIGTERM, SIGUSR1, SIGUSR2, SIGHUP or SIGINT. The
launching process passes the request to its ranks, which agree on a step at which to stop and save.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

from launcher.errors import EXIT_RESUMABLE
from launcher.runs.heartbeat import PHASES, read_heartbeat
from launcher.runs.job import Job
from launcher.runs.private_folder import remove_private_folders
from launcher.signals import (
    EXIT_BY_SIGNAL,
    STOP_SIGNALS,
    announce,
    announce_stop,
    end_process,
    handlers_restored,
    install,
)

_SECONDS_BETWEEN_LOOKS = 0.1

_SECONDS_TO_END = 2.0
"""Longest wait for a rank that has been killed."""


class SignalHandler:
    """Handle the signals that ask a run to stop, from before it is planned until it has ended.

    A job that saves checkpoints stops at the next step, with a checkpoint. Everything else ends at
    once: a job that saves nothing, a run that waits for its other nodes, one that has taken no step
    when Ctrl-C is pressed, and any run when Ctrl-C is pressed again.

    Creating a handler installs it in the main thread. In another thread it installs nothing,
    because Python allows signal handlers in the main thread alone; signals then act as they did.

    Args:
        exits: Whether ending at once ends this process, as a command does. Otherwise the handler
            raises KeyboardInterrupt, and `stopped_by` names the signal.
        saves: Whether this process starts a run that saves checkpoints. Every signal ends other
            work at once, from the beginning.
        reports: Whether ending at once prints which signal it was; not if the parent of this
            process does.
    """

    def __init__(self, *, exits: bool = True, saves: bool = True, reports: bool = True) -> None:
        self.stopped_by: signal.Signals | None = None
        """The first signal that asked the run to stop."""
        self._exits, self._saves, self._reports = exits, saves, reports
        self._job: Job | None = None
        self._announces = True
        self._waits_for_nodes = False
        self._interrupted = self._has_raised = False
        self._other_children = frozenset(multiprocessing.active_children())
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGINT, self._interrupt)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                install(number, self._stop)

    def attach(self, job: Job, *, announces: bool) -> None:
        """Handle signals for this run from now on, including one that came before.

        Args:
            job: The run.
            announces: Whether this process prints that the run will stop.
        """
        self.raise_again()
        self._job, self._announces = job, announces
        if self.stopped_by is None:
            return
        if not job.saves:
            self.end(self.stopped_by)
        self._signal_ranks()

    @contextlib.contextmanager
    def waiting_for_nodes(self) -> Iterator[None]:
        """Let signals end this process at once in this context, in which no rank runs.

        So does a signal that came before. Nothing is lost, so the exit code says that the run can
        be resumed.
        """
        self._waits_for_nodes = True
        if self.stopped_by is not None:
            self.end(self.stopped_by, EXIT_RESUMABLE)
        try:
            yield
        finally:
            self._waits_for_nodes = False

    def raise_again(self) -> None:
        """Raise the exception of a signal that ended the run, if an import has swallowed it.

        Raises:
            KeyboardInterrupt: A signal has ended the run.
        """
        if self._has_raised:
            raise KeyboardInterrupt

    def end(self, number: signal.Signals, exit_code: int | None = None) -> None:
        """Kill the ranks, or what starts them, and end at once.

        A command exits without raising an exception, because an import that runs at this moment
        could swallow it.

        Args:
            number: The signal.
            exit_code: The exit code of a command; None is that of a process that the signal ends.
        """
        ranks = self._ranks()
        for rank in ranks:
            rank.kill()
        for rank in ranks:  # what they still write would be left behind
            with contextlib.suppress(OSError, ValueError):  # the agent has waited for it
                rank.join(_SECONDS_TO_END)
        if self._exits:
            code = self.report(number)
            end_process(code if exit_code is None else exit_code)
        remove_private_folders()
        self.stopped_by, self._has_raised = number, True
        raise KeyboardInterrupt

    def report(self, number: signal.Signals) -> int:
        """Print which signal has ended the run; return the exit code of a process that it ends."""
        return announce_stop(number) if self._reports else EXIT_BY_SIGNAL + number

    def _interrupt(self, *_: object) -> None:
        if self._interrupted or not self._has_steps_to_lose():
            self.end(signal.SIGINT)
        self._interrupted = True
        self._stop(signal.SIGINT)

    def _stop(self, number: int, *_: object) -> None:
        if not self._saves or (self._job is not None and not self._job.saves):
            self.end(signal.Signals(number))
        if self._waits_for_nodes:
            self.end(signal.Signals(number), EXIT_RESUMABLE)
        if self.stopped_by is None:
            self.stopped_by = signal.Signals(number)
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            if self._announces:
                announce(f"{self.stopped_by.name}: stopping after this step{again}")
        self._signal_ranks()

    def _has_steps_to_lose(self) -> bool:
        if self._job is None or not self._job.saves or not self._ranks():
            return False
        heartbeat = read_heartbeat(self._job.run_dir, 0)
        return heartbeat is not None and heartbeat.phase != PHASES[0]

    def _ranks(self) -> list[BaseProcess]:
        """Return the processes of the run, without children that the program had before."""
        children = multiprocessing.active_children()
        return [child for child in children if child not in self._other_children]

    def _signal_ranks(self, *_: object) -> None:
        """Pass the request to the ranks; try again shortly while some have not started."""
        if self._job is None:
            return
        ranks = self._ranks()
        if len(ranks) < self._job.plan.nproc_per_node:
            signal.signal(signal.SIGALRM, self._signal_ranks)
            signal.setitimer(signal.ITIMER_REAL, _SECONDS_BETWEEN_LOOKS)
            return
        for rank in ranks:
            if rank.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGUSR1)


@contextlib.contextmanager
def library_signals(*, saves: bool = True) -> Iterator[SignalHandler]:
    """Handle signals for a run that a Python program starts, and restore its handlers at the end.

    A signal that ends the run at once is sent to this process again when the program's own
    handlers are back, so that the program reacts as it would without a run.

    Args:
        saves: Whether the run saves checkpoints.

    Raises:
        KeyboardInterrupt: A signal ended the run at once, and the program's handler returned.
    """
    if threading.current_thread() is not threading.main_thread():
        yield SignalHandler(exits=False, saves=saves)
        return
    with handlers_restored():
        previous_alarm = signal.getsignal(signal.SIGALRM)
        handler = SignalHandler(exits=False, saves=saves)
        interrupted = False
        try:
            yield handler
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if signal.getsignal(signal.SIGALRM) != previous_alarm:  # this run has set the timer
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, previous_alarm or signal.SIG_DFL)
    if interrupted:
        signal.raise_signal(handler.stopped_by or signal.SIGINT)
        raise KeyboardInterrupt
