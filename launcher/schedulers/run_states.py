"""The states of submitted runs, from their schedulers and from their folders."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import RunDirError
from launcher.paths import exists
from launcher.runs.final_result import find_result
from launcher.runs.mirror_record import mirror_problem
from launcher.runs.rundir import RunDir
from launcher.runs.status import RunState, read_outcome
from launcher.schedulers.scheduler import find_scheduler
from launcher.schedulers.submission import (
    SchedulerName,
    Submission,
    SubmittedRun,
    read_submission,
    submissions,
)


@dataclass(frozen=True, kw_only=True)
class SubmissionStatus:
    """The status of a submitted run."""

    run_dir: RunDir
    submission: Submission
    state: str
    """One of `launcher.runs.status.STATES`."""

    words: str
    """The status as text for users."""

    mirror_problem: str = ""
    """Why the object store of the run lacks what its folder has; empty if it does not."""

    evaluation: dict[str, float]
    """The final evaluation of a finished run; empty otherwise."""

    @property
    def line(self) -> str:
        """The status and the problem of the object store, as one line."""
        return "; ".join(filter(None, (self.words, self.mirror_problem)))


def status_of(run_dir: RunDir) -> SubmissionStatus:
    """Return the status of a run, from its scheduler and from the run folder.

    Raises:
        RunDirError: The run was not submitted, or its submission.json is damaged.
    """
    run = SubmittedRun(run_dir=run_dir, submission=read_submission(run_dir))
    (state,) = find_scheduler(run.submission.scheduler).states([run])
    return _status(run, state)


def list_statuses(below: Path) -> list[SubmissionStatus]:
    """Return the status of each submitted run below a folder; ask only about unended ones.

    A run with a damaged submission is listed as unknown.
    """
    statuses: dict[Path, SubmissionStatus] = {}
    unended: defaultdict[SchedulerName, list[SubmittedRun]] = defaultdict(list)
    run_dirs = list(submissions(below))
    for run_dir in run_dirs:
        try:
            run = SubmittedRun(run_dir=run_dir, submission=read_submission(run_dir))
            ended = read_outcome(run_dir) if exists(run_dir.result) else None
            if ended is None:
                unended[run.submission.scheduler].append(run)
            else:
                statuses[run_dir.path] = _status(run, ended)
        except RunDirError as error:
            unknown = Submission(job="?", log="", batch_size=0, total_steps=0)
            statuses[run_dir.path] = SubmissionStatus(
                run_dir=run_dir,
                submission=unknown,
                state="unknown",
                words=str(error),
                evaluation={},
            )
    for name, runs in unended.items():
        for status in _ask(name, runs):
            statuses[status.run_dir.path] = status
    return [statuses[run_dir.path] for run_dir in run_dirs]


def _ask(name: SchedulerName, runs: Sequence[SubmittedRun]) -> list[SubmissionStatus]:
    states = find_scheduler(name).states(runs)
    return [_status(run, state) for run, state in zip(runs, states, strict=True)]


def _status(run: SubmittedRun, state: RunState) -> SubmissionStatus:
    try:
        result = find_result(run.run_dir)
    except RunDirError:
        result = None
    evaluation = {} if result is None else result.evaluation
    return SubmissionStatus(
        run_dir=run.run_dir,
        submission=run.submission,
        state=state.name,
        words=state.words,
        mirror_problem=mirror_problem(run.run_dir),
        evaluation={name: math.nan if v is None else v for name, v in evaluation.items()},
    )
