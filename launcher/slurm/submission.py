"""What was submitted, kept in the run folder, and how it fares."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import RunDirError, SlurmError
from launcher.runs.rundir import RunDir, folders_of_runs, write_json
from launcher.runs.status import outcome, progress_words, read_result
from launcher.slurm.queue import GOING, WAITING, JobState, job_state


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run that Slurm was asked for; submission.json holds it."""

    job: str
    """Its id; in an array with the index, 1234_5."""

    log: str
    """The file that the job prints to."""

    batch_size: int
    total_steps: int
    settings: tuple[str, ...] = ()
    """What sets it apart in its array."""

    def save(self, run_dir: RunDir) -> None:
        """Write it into the run folder."""
        write_json(run_dir.submission, asdict(self))


@dataclass(frozen=True, kw_only=True)
class SubmissionStatus:
    """How a submitted run fares, in words."""

    run_dir: RunDir
    submission: Submission
    state: str
    """One of `launcher.runs.status.STATES`."""

    words: str
    evaluation: dict[str, float]
    """Of a run that has finished."""


def read_submission(run_dir: RunDir) -> Submission:
    """Return what was submitted.

    Raises:
        RunDirError: The run was not.
    """
    try:
        values = json.loads(run_dir.submission.read_text(encoding="utf-8"))
        return Submission(**values | {"settings": tuple(values["settings"])})
    except OSError:
        raise RunDirError(
            f"{run_dir.path} is no run that was submitted: it has no submission.json. Give a "
            "folder or a job that `launcher submit` printed."
        ) from None
    except (ValueError, TypeError, KeyError):
        raise RunDirError(f"{run_dir.submission} is damaged.") from None


def find_submission(what: str, below: Path) -> RunDir:
    """Return the run folder that a path or a job id names.

    Raises:
        RunDirError: There is none.
    """
    if (Path(what) / "submission.json").is_file():
        return RunDir(Path(what).resolve())
    for run_dir in submissions(below):
        if read_submission(run_dir).job == what:
            return run_dir
    raise RunDirError(
        f"{what} is neither the folder nor the job of a run that was submitted, below "
        f"{below.absolute()}. `launcher status` lists those that are."
    )


def find_submissions(what: str, below: Path) -> list[RunDir]:
    """Return the runs that a run folder, a job id or the folder of an array names.

    Raises:
        RunDirError: There is none.
    """
    path = Path(what)
    if not path.is_dir() or (path / "submission.json").exists():
        return [find_submission(what, below)]
    found = list(submissions(path))
    if not found:
        raise RunDirError(f"No run in {what} was submitted.")
    return found


def submissions(below: Path) -> Iterator[RunDir]:
    """Yield the submitted runs below a folder, not too deep, in the order of their names."""
    for run_dir in folders_of_runs(below):
        if run_dir.submission.is_file():
            yield run_dir


def status_of(run_dir: RunDir, *, ask: bool = True) -> SubmissionStatus:
    """Return how a run fares, by Slurm and by what it has written.

    Args:
        run_dir: The run's.
        ask: Whether Slurm is asked of one that has left its result as well.
    """
    submission = read_submission(run_dir)
    job, silence = None, "not known to Slurm any more, and left no result"
    if ask or not run_dir.result.exists():
        try:
            job = job_state(submission.job)
        except SlurmError as error:
            silence = str(error)
    state, words = _in_words(run_dir, submission, job, silence)
    return SubmissionStatus(
        run_dir=run_dir,
        submission=submission,
        state=state,
        words=words,
        evaluation=(read_result(run_dir) or {}).get("evaluation", {}),
    )


def _in_words(
    run_dir: RunDir, submission: Submission, job: JobState | None, silence: str
) -> tuple[str, str]:
    again = _again(job)
    if job is not None and job.state in WAITING:
        waits = f"waiting {job.waits}" if job.state == "PENDING" else job.state.lower()
        return "waiting", waits + again
    if job is not None and job.state in GOING:
        progress = progress_words(run_dir, submission.total_steps)
        return "running", f"running on {job.nodes}: {progress}{again}"
    if (come_to := outcome(run_dir)) is not None:
        return come_to.name, come_to.words + again
    if job is None:
        return "unknown", silence
    names = {
        "CANCELLED": ("cancelled", "cancelled"),
        "TIMEOUT": ("stopped", "reached its time limit before it could save"),
        "NODE_FAIL": ("lost", f"lost with {job.nodes}"),
        "OUT_OF_MEMORY": ("failed", "was killed for memory: ask for more, or use fewer workers"),
        "PREEMPTED": ("stopped", "made room for another job"),
    }
    ended = ("failed", f"{job.state.lower()} with exit code {job.exit_code}, see {submission.log}")
    state, words = names.get(job.state, ended)
    return state, words + again


def _again(job: JobState | None) -> str:
    if job is None or not job.restarts:
        return ""
    return f" (requeued {job.restarts} time{'s' if job.restarts > 1 else ''})"
