"""Submitted runs: the record of a submission in the run folder, and the status of the run."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from launcher.errors import RunDirError, SlurmError
from launcher.json_file import find_json
from launcher.paths import exists, is_dir
from launcher.runs.events import Timed, read_events
from launcher.runs.files import write_json
from launcher.runs.final_result import find_result
from launcher.runs.rundir import RunDir, find_run_dirs
from launcher.runs.status import progress_text, read_outcome, read_run_state
from launcher.slurm.queue import GOING, WAITING, JobState, job_state

JobId = Annotated[str, Meta(pattern=r"^\w[\w.+,%\[\]-]{0,199}$", description="a Slurm job id")]
"""A job id, which no command of Slurm can take for an option."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The submission of a run to Slurm, as submission.json holds it."""

    job: JobId
    """The job id; in an array with the index, such as 1234_5."""

    log: str
    """The file with the output of the job."""

    batch_size: int
    total_steps: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    settings: tuple[str, ...] = ()
    """The settings that distinguish the run within its array."""

    def save(self, run_dir: RunDir) -> None:
        """Write the submission into the run folder."""
        write_json(run_dir.submission, asdict(self))


@dataclass(frozen=True, kw_only=True)
class SubmissionStatus:
    """The status of a submitted run."""

    run_dir: RunDir
    submission: Submission
    state: str
    """One of `launcher.runs.status.STATES`."""

    words: str
    """The status as text for users."""

    evaluation: dict[str, float]
    """The final evaluation of a finished run; empty otherwise."""


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


def status_of(run_dir: RunDir, *, ask: bool = True) -> SubmissionStatus:
    """Return the status of a run, from Slurm and from the run folder.

    Args:
        run_dir: The run folder.
        ask: Whether Slurm is queried even if the run has written its result.

    Raises:
        RunDirError: The run was not submitted, or its submission.json is damaged.
    """
    return _status(run_dir, read_submission(run_dir), _Slurm(), ask=ask)


def list_statuses(below: Path) -> list[SubmissionStatus]:
    """Return the status of each submitted run below a folder; Slurm is asked about unended ones.

    A run with a damaged submission is listed as unknown. Once Slurm has not answered, the other
    states come from the run folders.
    """
    slurm, statuses = _Slurm(), []
    for run_dir in submissions(below):
        try:
            status = _status(run_dir, read_submission(run_dir), slurm, ask=False)
        except RunDirError as error:
            unknown = Submission(job="?", log="", batch_size=0, total_steps=0)
            status = SubmissionStatus(
                run_dir=run_dir,
                submission=unknown,
                state="unknown",
                words=str(error),
                evaluation={},
            )
        statuses.append(status)
    return statuses


class _Slurm:
    """Slurm as long as it answers: a query of a controller that is down takes seconds."""

    def __init__(self) -> None:
        self.problem: str | None = None
        """Why Slurm does not answer; None if it does."""

    def state(self, job: str) -> JobState | None:
        """Return the state of a job; None if Slurm does not know it or does not answer."""
        if self.problem is not None:
            return None
        try:
            return job_state(job)
        except SlurmError as error:
            self.problem = str(error)
            return None


def _status(
    run_dir: RunDir, submission: Submission, slurm: _Slurm, *, ask: bool
) -> SubmissionStatus:
    job = slurm.state(submission.job) if ask or not exists(run_dir.result) else None
    state, words = _state_and_words(run_dir, submission, job, slurm.problem)
    result = find_result(run_dir)
    evaluation = {} if result is None else result.evaluation
    return SubmissionStatus(
        run_dir=run_dir,
        submission=submission,
        state=state,
        words=words,
        evaluation={name: math.nan if v is None else v for name, v in evaluation.items()},
    )


def _state_and_words(
    run_dir: RunDir, submission: Submission, job: JobState | None, problem: str | None
) -> tuple[str, str]:
    """Return the state of a run and its words.

    Args:
        run_dir: The run folder.
        submission: Its submission.
        job: The state of the job; None if Slurm does not know it.
        problem: Why Slurm does not answer; None if it does.
    """
    requeues = _requeues_text(job)
    if job is not None and job.state in WAITING:
        waits = f"waiting {job.waits}" if job.state == "PENDING" else job.state.lower()
        return "waiting", waits + requeues
    if job is not None and job.state in GOING:
        planned = [event.steps for event in read_events(run_dir) if isinstance(event, Timed)]
        progress = progress_text(run_dir, planned[-1] if planned else submission.total_steps)
        return "running", f"running on {job.nodes}: {progress}{requeues}"
    if job is None and problem is not None:
        state = read_run_state(run_dir)
        note = "" if state.name in ("finished", "failed") else f" (by its folder: {problem})"
        return state.name, state.words + note
    if (ended := read_outcome(run_dir)) is not None:
        return ended.name, ended.words + requeues
    if job is None:
        return "unknown", "unknown to Slurm, and without a result"
    names = {
        "CANCELLED": ("cancelled", "cancelled"),
        "TIMEOUT": ("stopped", "reached its time limit before it could save"),
        "NODE_FAIL": ("lost", f"lost with the node {job.nodes}"),
        "OUT_OF_MEMORY": ("failed", "ran out of memory: ask for more, or use fewer workers"),
        "PREEMPTED": ("stopped", "was preempted by another job"),
    }
    failed = ("failed", f"{job.state.lower()} with exit code {job.exit_code}, see {submission.log}")
    state_name, words = names.get(job.state, failed)
    return state_name, words + requeues


def _requeues_text(job: JobState | None) -> str:
    if job is None or not job.restarts:
        return ""
    return f" (requeued {job.restarts} time{'s' if job.restarts > 1 else ''})"
