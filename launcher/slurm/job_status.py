"""The states of submitted runs, from their jobs in Slurm and from their folders."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.errors import SlurmError
from launcher.runs.events import Timed, read_events
from launcher.runs.status import RunState, progress_text, read_outcome, read_run_state
from launcher.schedulers.submission import SubmittedRun
from launcher.slurm.job_states import GOING, WAITING, JobState, job_states


def run_states(runs: Sequence[SubmittedRun]) -> list[RunState]:
    """Return the state of each run; those of their folders where Slurm does not answer."""
    problem = None
    jobs: dict[str, JobState] = {}
    try:
        jobs = job_states(run.submission.job for run in runs)
    except SlurmError as error:
        problem = str(error)
    return [_state_in_words(run, jobs.get(run.submission.job), problem) for run in runs]


def _state_in_words(run: SubmittedRun, job: JobState | None, problem: str | None) -> RunState:
    """Return the state of a run.

    Args:
        run: The run.
        job: The state of the job; None if Slurm does not know it.
        problem: Why Slurm does not answer; None if it does.
    """
    run_dir, submission = run.run_dir, run.submission
    requeues = _requeues_text(job)
    if job is not None and job.state in WAITING:
        waits = f"waiting {job.waits}" if job.state == "PENDING" else job.state.lower()
        return RunState(name="waiting", words=waits + requeues)
    if job is not None and job.state in GOING:
        planned = [event.steps for event in read_events(run_dir) if isinstance(event, Timed)]
        progress = progress_text(run_dir, planned[-1] if planned else submission.total_steps)
        return RunState(name="running", words=f"running on {job.nodes}: {progress}{requeues}")
    if job is None and problem is not None:
        state = read_run_state(run_dir)
        note = "" if state.name in ("finished", "failed") else f" (by its folder: {problem})"
        return RunState(name=state.name, words=state.words + note)
    if (ended := read_outcome(run_dir)) is not None:
        return RunState(name=ended.name, words=ended.words + requeues)
    if job is None:
        return RunState(name="unknown", words="unknown to Slurm, and without a result")
    names = {
        "CANCELLED": ("cancelled", "cancelled"),
        "TIMEOUT": ("stopped", "reached its time limit before it could save"),
        "NODE_FAIL": ("lost", f"lost with the node {job.nodes}"),
        "OUT_OF_MEMORY": ("failed", "ran out of memory: ask for more, or use fewer workers"),
        "PREEMPTED": ("stopped", "was preempted by another job"),
    }
    failed = ("failed", f"{job.state.lower()} with exit code {job.exit_code}, see {submission.log}")
    name, words = names.get(job.state, failed)
    return RunState(name=name, words=words + requeues)


def _requeues_text(job: JobState | None) -> str:
    if job is None or not job.restarts:
        return ""
    return f" (requeued {job.restarts} time{'s' if job.restarts > 1 else ''})"
