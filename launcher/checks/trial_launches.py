"""Launch the trials of a proof in their order; on CPUs, two beside each other where both fit.

While the ranks of one trial wait for each other, those of the other one compute. What is compared
are steps and not times, so that trials may take time from each other.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Collection, Iterator, Sequence
from multiprocessing.connection import wait

from launcher.environment.machine import free_memory_bytes
from launcher.forking import reason_not_to_fork
from launcher.launch.forked_launch import ForkedLaunch, LaunchOutcome
from launcher.launch.launcher import import_for, launch
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.runs.failure_record import RunFailedError
from launcher.runs.job import Job

_MOST_AT_ONCE = 2

_SECONDS_BETWEEN_LOOKS = 0.2
"""A process whose end is hidden by one that it has left running is noticed after this time."""

_MEMORY_MARGIN = 2
"""A rank may need this many times the memory that a rank of the first trial has needed."""


def launch_trials(jobs: Sequence[Job], signals: SignalHandler) -> Iterator[LaunchOutcome]:
    """Run jobs and yield the outcome of each, in their order.

    The first job runs alone: it makes the files that a recipe prepares once, and shows how much
    memory a rank needs. The others do not start before the next outcome is asked for. Closing the
    iterator kills the ranks that still run.

    Args:
        jobs: The jobs. They save no checkpoints.
        signals: Handles signals for the runs.

    Raises:
        LauncherError: The ranks of a job could not be started.
    """
    plans = [job.plan for job in jobs]
    alone = len(jobs) == 1 or any(plan.device != "cpu" for plan in plans)
    if alone or reason_not_to_fork() is not None:
        import_for(plans)
        for job in jobs:
            yield _launch_here(job, signals)
        return
    with _ended_by_sigquit(signals):
        import_for(plans[:1])
        first = ForkedLaunch(jobs[0])
        try:
            import_for(plans)  # while the first trial runs
            outcome = first.end()
        except BaseException:
            first.kill()
            raise
        most_processes = _most_processes(outcome.peak_bytes)
        yield outcome
        yield from _launch_beside(jobs[1:], most_processes)


def _launch_here(job: Job, signals: SignalHandler) -> LaunchOutcome:
    """Run a job from this process, and return its outcome."""
    try:
        return LaunchOutcome(exit_code=launch(job, signals=signals))
    except RunFailedError as error:
        return LaunchOutcome(exit_code=error.exit_code, error=str(error))


def _launch_beside(jobs: Sequence[Job], most_processes: int) -> Iterator[LaunchOutcome]:
    """Run jobs and yield their outcomes in their order.

    Args:
        jobs: The jobs.
        most_processes: Number of processes of all jobs that run beside each other.
    """
    launches: dict[int, ForkedLaunch] = {}
    outcomes: dict[int, LaunchOutcome] = {}
    num_started = 0
    try:
        for index in range(len(jobs)):
            while index not in outcomes:
                while _has_place(jobs, num_started, launches, most_processes):
                    launches[num_started] = ForkedLaunch(jobs[num_started])
                    num_started += 1
                signs = [sign for launched in launches.values() for sign in launched.signs]
                wait(signs, timeout=_SECONDS_BETWEEN_LOOKS)
                for each in [number for number in launches if launches[number].has_ended]:
                    outcomes[each] = launches.pop(each).end()
            yield outcomes.pop(index)
    finally:
        for launched in launches.values():
            launched.kill()


def _has_place(
    jobs: Sequence[Job], index: int, running: Collection[int], most_processes: int
) -> bool:
    """Return whether a job may start beside those that are running."""
    if index == len(jobs) or len(running) == _MOST_AT_ONCE:
        return False
    processes = sum(_num_processes(jobs[each].plan) for each in (*running, index))
    return not running or processes <= most_processes


def _num_processes(plan: Plan) -> int:
    return plan.nproc_per_node * (1 + plan.workers_per_rank)


def _most_processes(peak_bytes: int) -> int:
    """Return how many processes the free memory holds, if one has needed `peak_bytes`."""
    free = free_memory_bytes()
    return 0 if free is None or not peak_bytes else free // (_MEMORY_MARGIN * peak_bytes)


@contextlib.contextmanager
def _ended_by_sigquit(signals: SignalHandler) -> Iterator[None]:
    """Let SIGQUIT end the ranks and this process, as the elastic agent does while it runs here."""
    before = signal.signal(signal.SIGQUIT, lambda *_: signals.end(signal.SIGQUIT))
    try:
        yield
    finally:
        signal.signal(signal.SIGQUIT, before)
