"""What was submitted, kept in the run folder, and how it fares."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import RunDirError, SlurmError
from launcher.report.quantities import duration
from launcher.rundir import RunDir, read_failure, write_json
from launcher.slurm.queue import GOING, WAITING, JobState, job_state

_DEPTH = 3
"""runs/<array>/<index> below a folder: what lies deeper is somebody else's."""


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
class Status:
    """How a submitted run fares, in words."""

    run_dir: RunDir
    submission: Submission
    state: str
    """waiting, running, finished, stopped, failed, cancelled, lost or unknown."""

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
    for path in _folders(below, _DEPTH):
        if (path / "submission.json").is_file():
            yield RunDir(path.resolve())


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """Yield a folder and those in it, but none in a run."""
    yield folder
    if depth == 0 or (folder / "submission.json").is_file():
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        inner = [each.name for each in entries if each.is_dir() and not each.name.startswith(".")]
        for name in sorted(inner):
            yield from _folders(folder / name, depth - 1)


def status_of(run_dir: RunDir, *, ask: bool = True) -> Status:
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
    return Status(
        run_dir=run_dir,
        submission=submission,
        state=state,
        words=words,
        evaluation=(_read(run_dir.result) or {}).get("evaluation", {}),
    )


def _in_words(
    run_dir: RunDir, submission: Submission, job: JobState | None, silence: str
) -> tuple[str, str]:
    again = _again(job)
    if job is not None and job.state in WAITING:
        waits = f"waiting {job.waits}" if job.state == "PENDING" else job.state.lower()
        return "waiting", waits + again
    if job is not None and job.state in GOING:
        return "running", f"running on {job.nodes}: {_progress(run_dir, submission)}{again}"
    if (result := _read(run_dir.result)) is not None:
        values = result["evaluation"] or {"loss": result["train_loss"]}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        return "finished", f"finished after {result['steps']:,} steps: {shown}{again}"
    if (failure := read_failure(run_dir)) is not None:
        head = failure["message"].splitlines()[0] if failure["message"] else failure["error"]
        where = f"rank {failure['rank']} ({failure['node']})"
        return "failed", f"failed on {where}: {failure['error']}: {head}{again}"
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


def _progress(run_dir: RunDir, submission: Submission) -> str:
    """Return the last step that was written, and when the run will have ended."""
    row = _last_step(run_dir.metrics)
    if row is None:
        return "starting"
    step, speed = row["step"], row["samples_per_second"]
    left = (submission.total_steps - step) * submission.batch_size / speed if speed else None
    loss = "nan" if row["loss"] is None else f"{row['loss']:.4g}"
    return (
        f"step {step:,} of {submission.total_steps:,}, loss {loss}, {speed or 0:,.0f} samples/s, "
        f"{duration(left)} left"
    )


def _last_step(path: Path) -> dict[str, Any] | None:
    """Return the last whole line of metrics.jsonl that is of a step."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 8192, 0))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if "loss" in row and "samples_per_second" in row:
            return row
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values
