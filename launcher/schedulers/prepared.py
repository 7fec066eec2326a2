"""A job that is planned but not submitted, and how it is submitted as a whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.planning.plan import Plan
from launcher.runs.files import write_atomic
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.schedulers.job_code import JobCode
from launcher.schedulers.submission import SchedulerName, Submission


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job that is planned but not submitted."""

    scheduler: SchedulerName
    """The scheduler of the job."""

    folder: Path
    """The run folder, or the folder of all runs of the array."""

    files: Mapping[str, str]
    """The text of each file that describes the job, by its name in that folder."""

    plans: tuple[Plan, ...]
    """The plan of each run."""

    folders: tuple[RunDir, ...]
    """The folder of each run."""

    logs: tuple[str, ...]
    """The file with the job's output for each run; empty texts if the scheduler keeps it."""

    grid: tuple[tuple[str, ...], ...] = ()
    """The settings of each run of an array; empty for a single run."""

    code: JobCode | None = None
    """What is copied into the folder before the job is submitted; None copies nothing."""

    where: Mapping[str, str] = field(default_factory=dict)
    """What the scheduler needs to find the job again, besides its id."""

    @property
    def text(self) -> str:
        """The text of all files, as `--dry-run` prints it."""
        return "".join(self.files.values())

    def job_of(self, job: str, index: int) -> str:
        """Return the job id of a run of an array, from that of the array."""
        return f"{job}_{index}"

    def save(self, job: str) -> None:
        """Write the job id into the folder of each run."""
        for index, (run_dir, plan) in enumerate(zip(self.folders, self.plans, strict=True)):
            (run_dir.path / "logs").mkdir(parents=True, exist_ok=True)
            Submission(
                scheduler=self.scheduler,
                job=self.job_of(job, index) if self.grid else job,
                log=self.logs[index],
                batch_size=plan.batch_size,
                total_steps=plan.total_steps,
                settings=self.grid[index] if self.grid else (),
                where=dict(self.where),
            ).save(run_dir)


def submit_prepared(prepared: Prepared, send: Callable[[Path], str]) -> tuple[str, RunDir]:
    """Make the run folder of a job and send the job; leave nothing behind if that fails.

    Args:
        prepared: The job.
        send: Submits the job, whose files are in the folder that it is given; returns the job id.

    Returns:
        The job id and the run folder, or the folder of the array.

    Raises:
        SchedulerError: The scheduler rejects the job.
        RunDirError: The folder exists or cannot be made.
    """
    folder = create_run_dir(prepared.folder, prepared.plans[0].recipe)
    try:
        if prepared.code is not None:
            prepared.code.copy_to(folder.path)
        for name, text in prepared.files.items():
            write_atomic(folder.path / name, text)
        prepared.save("")  # the job may start before its id is known
        job = send(folder.path)
    except BaseException:
        shutil.rmtree(folder.path)
        raise
    prepared.save(job)
    return job, folder
