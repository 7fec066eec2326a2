"""The interface of a scheduler, and the table of all schedulers.

A scheduler turns a request into text, submits it, and answers for the jobs that it was given. Its
module is imported when it is needed, because `launcher submit` imports one of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from launcher.runs.rundir import RunDir
from launcher.runs.status import RunState
from launcher.schedulers.prepared import Prepared
from launcher.schedulers.request import SubmitRequest
from launcher.schedulers.submission import SchedulerName, SubmittedRun

_MODULES: dict[SchedulerName, str] = {
    "slurm": "launcher.slurm.slurm_scheduler",
    "kubernetes": "launcher.kubernetes.kubernetes_scheduler",
    "ssh": "launcher.hosts.ssh_scheduler",
    "skypilot": "launcher.skypilot.skypilot_scheduler",
}
"""The module of each scheduler, whose `SCHEDULER` implements the interface."""

SCHEDULER_NAMES: tuple[SchedulerName, ...] = tuple(_MODULES)
"""The names that `launcher submit --to` takes; the first is the default."""


class Scheduler(Protocol):
    """A program that starts jobs on the nodes of a cluster."""

    def prepare(self, request: SubmitRequest, cluster: str | None, out: Path | None) -> Prepared:
        """Plan the runs of a request and return the job as text; write nothing.

        Args:
            request: What to submit.
            cluster: The site profile, by its file or name; None is the default one.
            out: The run folder to make; None is one below runs/.

        Raises:
            UsageError: The request, the profile or the recipe is wrong.
        """

    def check(self, prepared: Prepared) -> str:
        """Let the scheduler check a job without submitting it; return what it says.

        Raises:
            SchedulerError: The scheduler refuses the job.
        """

    def submit(self, prepared: Prepared) -> tuple[str, RunDir]:
        """Make the run folder and submit the job; leave nothing behind if that fails.

        Returns:
            The job id and the run folder, or the folder of the array.

        Raises:
            SchedulerError: The scheduler refuses the job.
            RunDirError: The folder exists or cannot be made.
        """

    def states(self, runs: Sequence[SubmittedRun]) -> list[RunState]:
        """Return the state of each run; that of its folder where the scheduler does not answer."""

    def copy_log(
        self, run: SubmittedRun, write: Callable[[bytes], object], *, follows: bool
    ) -> None:
        """Pass the output of a job to `write`.

        Args:
            run: The run.
            write: Called with each next part of the output.
            follows: Whether to continue until the run has ended.

        Raises:
            UsageError: The job has printed nothing, or its output cannot be read.
        """

    def cancel(self, runs: Sequence[SubmittedRun]) -> None:
        """Cancel the jobs of runs, whether they wait or run.

        Raises:
            SchedulerError: The scheduler refuses.
        """


def find_scheduler(name: SchedulerName) -> Scheduler:
    """Return the scheduler of this name."""
    scheduler: Scheduler = importlib.import_module(_MODULES[name]).SCHEDULER
    return scheduler
