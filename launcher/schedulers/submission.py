"""Submitted runs: the record of a submission in the run folder, and where such runs are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from launcher.errors import RunDirError
from launcher.json_file import find_json
from launcher.paths import exists, is_dir
from launcher.runs.files import write_json
from launcher.runs.rundir import RunDir, find_run_dirs

JobId = Annotated[str, Meta(pattern=r"^\w[\w.+,%\[\]-]{0,199}$", description="a job id")]
"""A job id, which no command of a scheduler can take for an option."""

SchedulerName = Literal["slurm", "kubernetes", "ssh", "skypilot"]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The submission of a run to a scheduler, as submission.json holds it."""

    job: JobId
    """The job id; in an array with the index, such as 1234_5."""

    log: str
    """The file with the output of the job; empty if the scheduler keeps the output."""

    batch_size: int
    total_steps: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    settings: tuple[str, ...] = ()
    """The settings that distinguish the run within its array."""

    scheduler: SchedulerName = "slurm"
    """The scheduler of the job; earlier versions submitted to Slurm alone and did not record it."""

    where: Mapping[str, str] = field(default_factory=dict)
    """What the scheduler needs to find the job besides its id, such as a namespace."""

    def save(self, run_dir: RunDir) -> None:
        """Write the submission into the run folder."""
        write_json(run_dir.submission, asdict(self))


@dataclass(frozen=True, kw_only=True)
class SubmittedRun:
    """A run that was submitted."""

    run_dir: RunDir
    submission: Submission


def read_submission(run_dir: RunDir) -> Submission:
    """Return the submission of a run.

    Raises:
        RunDirError: The run was not submitted, or its submission.json is damaged.
    """
    submission = find_json(run_dir.submission, Submission)
    if submission is None:
        raise RunDirError(
            f"{run_dir.path} was not submitted: it has no submission.json. Give a folder or a job "
            "id that `launcher submit` printed."
        )
    return submission


def find_submission(what: str, below: Path) -> RunDir:
    """Return the folder of the submitted run with this path or job id.

    Args:
        what: A run folder or a job id.
        below: The folder below which jobs are looked up; damaged submissions there are skipped.

    Raises:
        RunDirError: There is no such run.
    """
    if exists(Path(what) / "submission.json"):
        return RunDir(Path(what).resolve())
    for run_dir in submissions(below):
        with contextlib.suppress(RunDirError):
            if read_submission(run_dir).job == what:
                return run_dir
    raise RunDirError(
        f"{what} is neither the folder nor the job id of a submitted run below "
        f"{below.absolute()}. `launcher status` lists the submitted runs."
    )


def find_submissions(what: str, below: Path) -> list[RunDir]:
    """Return the submitted runs of a run folder, a job id or the folder of an array.

    Raises:
        RunDirError: There is no such run.
    """
    path = Path(what)
    if not is_dir(path) or exists(path / "submission.json"):
        return [find_submission(what, below)]
    run_dirs = list(submissions(path))
    if not run_dirs:
        raise RunDirError(f"{what} holds no submitted run.")
    return run_dirs


def submissions(below: Path) -> Iterator[RunDir]:
    """Yield the submitted runs below a folder, at most three levels deep, sorted by name."""
    for run_dir in find_run_dirs(below):
        if os.path.lexists(run_dir.submission):
            yield run_dir
