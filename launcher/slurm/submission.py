"""Submitted runs: the record of a submission in the run folder, and the status of the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import RunDirError, SlurmError
from launcher.runs.rundir import RunDir, find_run_dirs, write_json
from launcher.runs.status import progress_text, read_outcome, read_result
from launcher.slurm.queue import GOING, WAITING, JobState, job_state


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The submission of a run to Slurm, as submission.json holds it."""

    job: str
    """The job id; in an array with the index, such as 1234_5."""

    log: str
    """The file with the output of the job."""

    batch_size: int
    total_steps: int
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
    try:
        values = json.loads(run_dir.submission.read_text(encoding="utf-8"))
        return Submission(**values | {"settings": tuple(values["settings"])})
    except OSError:
        raise RunDirError(
            f"{run_dir.path} was not submitted: it has no submission.json. Give a folder or a job "
            "id that `launcher submit` printed."
        ) from None
    except (ValueError, TypeError, KeyError):
        raise RunDirError(f"{run_dir.submission} is damaged.") from None


def find_submission(what: str, below: Path) -> RunDir:
    """Return the folder of the submitted run with this path or job id.

    Args:
        what: A run folder or a job id.
        below: The folder below which jobs are looked up.

    Raises:
        RunDirError: There is no such run.
    """
    if (Path(what) / "submission.json").is_file():
        return RunDir(Path(what).resolve())
    for run_dir in submissions(below):
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
    if not path.is_dir() or (path / "submission.json").exists():
        return [find_submission(what, below)]
    run_dirs = list(submissions(path))
    if not run_dirs:
        raise RunDirError(f"{what} holds no submitted run.")
    return run_dirs


def submissions(below: Path) -> Iterator[RunDir]:
    """Yield the submitted runs below a folder, at most three levels deep, sorted by name."""
    for run_dir in find_run_dirs(below):
        if run_dir.submission.is_file():
            yield run_dir


def status_of(run_dir: RunDir, *, ask: bool = True) -> SubmissionStatus:
    """Return the status of a run, from Slurm and from the run folder.

    Args:
        run_dir: The run folder.
        ask: Whether Slurm is queried even if the run has written its result.
    """
    submission = read_submission(run_dir)
    job, no_answer = None, "unknown to Slurm, and without a result"
    if ask or not run_dir.result.exists():
        try:
            job = job_state(submission.job)
        except SlurmError as error:
            no_answer = str(error)
    state, words = _state_and_words(run_dir, submission, job, no_answer)
    return SubmissionStatus(
        run_dir=run_dir,
        submission=submission,
        state=state,
        words=words,
        evaluation=(read_result(run_dir) or {}).get("evaluation", {}),
    )


def _state_and_words(
    run_dir: RunDir, submission: Submission, job: JobState | None, no_answer: str
) -> tuple[str, str]:
    requeues = _requeues_text(job)
    if job is not None and job.state in WAITING:
        waits = f"waiting {job.waits}" if job.state == "PENDING" else job.state.lower()
        return "waiting", waits + requeues
    if job is not None and job.state in GOING:
        progress = progress_text(run_dir, submission.total_steps)
        return "running", f"running on {job.nodes}: {progress}{requeues}"
    if (ended := read_outcome(run_dir)) is not None:
        return ended.name, ended.words + requeues
    if job is None:
        return "unknown", no_answer
    names = {
        "CANCELLED": ("cancelled", "cancelled"),
        "TIMEOUT": ("stopped", "reached its time limit before it could save"),
        "NODE_FAIL": ("lost", f"lost with the node {job.nodes}"),
        "OUT_OF_MEMORY": ("failed", "ran out of memory: ask for more, or use fewer workers"),
        "PREEMPTED": ("stopped", "was preempted by another job"),
    }
    failed = ("failed", f"{job.state.lower()} with exit code {job.exit_code}, see {submission.log}")
    state, words = names.get(job.state, failed)
    return state, words + requeues


def _requeues_text(job: JobState | None) -> str:
    if job is None or not job.restarts:
        return ""
    return f" (requeued {job.restarts} time{'s' if job.restarts > 1 else ''})"
