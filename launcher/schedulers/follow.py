"""Follow a run until it ends, by its folder and, if it was submitted, by its scheduler."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

from launcher.errors import RunDirError
from launcher.paths import exists
from launcher.regular_file import open_regular
from launcher.runs.history import History
from launcher.runs.rundir import RunDir, open_run_dir
from launcher.runs.status import ACTIVE_STATES, RunState, read_run_state
from launcher.schedulers.run_states import status_of
from launcher.schedulers.submission import find_submission

_SECONDS_BETWEEN_POLLS = 0.5
_POLLING_SHARE = 0.2
"""The share of the time that polling may take: the run may use the same machine."""

_METRICS_BYTES = 1 << 25
"""Bytes read from the end of metrics.jsonl: about the last hundred thousand steps."""

_SECONDS_BETWEEN_QUERIES = 5.0
"""Seconds between two queries to the scheduler."""

_QUERYING_SHARE = 0.1
"""The share of the time that queries may take: one of a controller that is down takes 18 s."""

_SECONDS_BETWEEN_COPIES = 0.2
_BYTES_AT_ONCE = 1 << 16


def find_run(name: str) -> RunDir:
    """Return the run that `name` stands for: its folder, or the job id of a submitted run.

    Raises:
        RunDirError: There is no such run below the working folder.
    """
    if exists(Path(name, "run.yaml")):
        return open_run_dir(Path(name))
    try:
        return find_submission(name, Path())
    except RunDirError:
        raise RunDirError(
            f"{name} is neither a run folder nor the job id of a run submitted from here. "
            "`launcher runs` lists the runs below this folder."
        ) from None


def follow(
    run_dir: RunDir,
    show: Callable[[History, RunState], None],
    show_waiting: Callable[[str], None],
    *,
    seconds: float,
) -> RunState:
    """Show a run every few seconds until it has ended.

    Args:
        run_dir: The run folder.
        show: Shows the run as far as it has come.
        show_waiting: Shows why the run has not started.
        seconds: The time between two calls of `show`.

    Returns:
        The final state.
    """
    history: History | None = None
    in_queue: RunState | None = None
    query_at = 0.0
    while True:
        poll_began = time.monotonic()
        if exists(run_dir.run_yaml):
            if history is None:
                history = History(run_dir, newest=_METRICS_BYTES)
            else:
                history.refresh()
        if time.monotonic() > query_at:
            began = time.monotonic()
            in_queue = _queued_state(run_dir)
            query_at = _next_query(began)
        state = _combined_state(run_dir, history, in_queue)
        if history is not None:
            show(history, state)
        else:
            show_waiting(f"{run_dir.shown}: {state.words}")
        if state.name not in ACTIVE_STATES:
            # The scheduler may have requeued the job since the last query.
            latest = _queued_state(run_dir)
            if latest is None or latest.name not in ACTIVE_STATES:
                return state
        pause = seconds if history is not None else _SECONDS_BETWEEN_POLLS
        poll_seconds = time.monotonic() - poll_began
        time.sleep(max(pause, poll_seconds * (1 / _POLLING_SHARE - 1)))


def copy_log_file(
    path: Path, run_dir: RunDir, write: Callable[[bytes], object], *, follows: bool
) -> None:
    """Pass the content of a log file to `write`.

    Args:
        path: The log file.
        run_dir: The submitted run.
        write: Called with each next part of the log.
        follows: Whether to continue until the run has ended.

    Raises:
        RunDirError: There is no such log, or it cannot be read.
    """
    if not exists(path) and not follows:
        digits = (log.stem[4:] for log in path.parent.glob("rank*.log"))
        ranks = sorted(int(text) for text in digits if text.isascii() and text.isdigit())
        hint = f" There are logs of the ranks {', '.join(map(str, ranks))}." if ranks else ""
        raise RunDirError(f"{path} does not exist: nothing has been printed yet.{hint}")
    position, query_at = 0, 0.0
    ended = not follows
    while True:
        if exists(path):
            position = _copy_appended(path, position, write)
        if ended:
            return
        if time.monotonic() > query_at:
            began = time.monotonic()
            ended = status_of(run_dir).state not in ACTIVE_STATES
            query_at = _next_query(began)
        if not ended:
            time.sleep(_SECONDS_BETWEEN_COPIES)


def _next_query(began: float) -> float:
    """Return when to query Slurm again, after a query that began at `began` and has just ended."""
    ended = time.monotonic()
    return ended + max(_SECONDS_BETWEEN_QUERIES, (ended - began) * (1 / _QUERYING_SHARE - 1))


def _copy_appended(path: Path, position: int, write: Callable[[bytes], object]) -> int:
    """Copy what was appended to a log since it had `position` bytes; return its present size.

    Raises:
        RunDirError: The log cannot be read, or is not a regular file.
    """
    try:
        with io.BufferedReader(open_regular(path)) as file:
            file.seek(position)
            while content := file.read(_BYTES_AT_ONCE):
                write(content)
            return file.tell()
    except OSError as error:
        raise RunDirError(f"Cannot read {path}: {error.strerror or error}.") from None


def _combined_state(
    run_dir: RunDir, history: History | None, in_queue: RunState | None
) -> RunState:
    """Return the state by the run folder or, if the folder does not tell, by the scheduler."""
    state = history.state if history is not None else read_run_state(run_dir)
    if state.name in ("running", "finished", "failed") or in_queue is None:
        return state
    return in_queue


def _queued_state(run_dir: RunDir) -> RunState | None:
    """Return the state by the scheduler; None if the run was not submitted or is unknown."""
    if not exists(run_dir.submission):
        return None
    status = status_of(run_dir)
    return None if status.state == "unknown" else RunState(name=status.state, words=status.words)
