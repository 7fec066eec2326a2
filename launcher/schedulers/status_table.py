"""The status of submitted runs as a table and as plain values."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from launcher.printable import printable_line
from launcher.runs.status import STATES
from launcher.schedulers.run_states import SubmissionStatus


def sort_statuses(statuses: list[SubmissionStatus]) -> list[SubmissionStatus]:
    """Return runs in progress first, then finished ones from the best result to the worst."""
    return sorted(statuses, key=_sort_key)


def status_cells(status: SubmissionStatus) -> tuple[str, ...]:
    """Return the row of a run: folder, job id, settings within its array, and state."""
    submission = status.submission
    cells = status.run_dir.shown, submission.job, " ".join(submission.settings), status.line
    return tuple(map(printable_line, cells))


def status_values(status: SubmissionStatus) -> dict[str, Any]:
    """Return the status of a run as plain values that JSON can hold."""
    values: dict[str, Any] = {"run": str(status.run_dir.path)}
    values |= {"state": status.state, "words": status.words}
    values |= {"mirror_problem": status.mirror_problem} if status.mirror_problem else {}
    return values | {"evaluation": status.evaluation} | asdict(status.submission)


def _sort_key(status: SubmissionStatus) -> tuple[float, ...]:
    """Order by state, then by the best metric besides the loss, then by the loss."""
    finite = {name: v if math.isfinite(v) else math.inf for name, v in status.evaluation.items()}
    losses = [name for name in finite if name.rpartition("/")[2] == "loss"]  # one of each set
    metrics = [finite[name] for name in finite if name not in losses]
    best = max(filter(math.isfinite, metrics), default=None)
    loss = finite[losses[0]] if losses else 0.0
    return STATES.index(status.state), loss if best is None else -best, loss
