"""The live display of a run in a notebook: progress, losses and, at the end, a post-mortem."""

from __future__ import annotations

import contextlib
import html
import time
from collections.abc import Callable
from typing import Any

from launcher.console.watch_screen import status_line
from launcher.errors import LauncherError
from launcher.printable import printable
from launcher.runs.failure_record import RunFailedError
from launcher.runs.history import History
from launcher.runs.rich_text import failure_html, losses_svg, metrics_line, table_html
from launcher.runs.rundir import RunDir

_SECONDS_BETWEEN_UPDATES = 0.4
_SHARE_OF_TIME = 0.1
"""Largest share of the time that updates may take, where a run has very many steps."""

_BAR = "height:8px;border-radius:4px"
_STOPPING = "stopping after this step with a checkpoint; interrupt again to stop at once"


class NotebookScreen:
    """A cell's output that shows one run and is replaced at every update.

    Args:
        is_stopping: Returns whether a signal has asked the run to stop.
    """

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        from IPython.display import display

        self._is_stopping = is_stopping
        self._history: History | None = None
        self._due = 0.0
        self._handle: Any = display(_bundle("planning", ""), raw=True, display_id=True)

    def update(self, run_dir: RunDir) -> None:
        """Show the run as its folder has it, unless it was shown just now."""
        started = time.perf_counter()
        if started < self._due:
            return
        self._show(run_dir)
        taken = time.perf_counter() - started
        self._due = started + max(_SECONDS_BETWEEN_UPDATES, taken / _SHARE_OF_TIME)

    def end(self, run_dir: RunDir) -> None:
        """Show the run for the last time."""
        self._show(run_dir)

    def fail(self, error: BaseException) -> None:
        """Show a failed run with its post-mortem; leave nothing of a run that was not started."""
        if isinstance(error, RunFailedError):
            error.is_shown = True
            losses = "" if self._history is None else losses_svg(self._history)
            content = _bundle(str(error), failure_html(str(error)) + losses)
        elif self._history is None:
            content = _bundle("", "")
        else:
            return
        self._handle.update(content, raw=True)

    def _show(self, run_dir: RunDir) -> None:
        with contextlib.suppress(LauncherError, OSError):  # a file is being replaced, or damaged
            if self._history is None:
                self._history = History(run_dir)
            else:
                self._history.refresh()
            self._handle.update(_content(self._history, self._is_stopping()), raw=True)


def _content(history: History, is_stopping: bool) -> dict[str, str]:
    plan = history.plan
    line = status_line(history, history.state)
    if is_stopping and history.state.name == "running":
        line = _STOPPING
    rows = {plan.recipe: line}
    if history.evaluations:
        step, values = history.evaluations[-1]
        rows[f"evaluation after step {step:,}"] = metrics_line(values)
    rows["run folder"] = history.run_dir.shown
    bar = _bar(history.last_step / max(history.total_steps, 1))
    return _bundle(line, bar + table_html(rows) + losses_svg(history))


def _bar(share: float) -> str:
    return (
        f'<div style="{_BAR};max-width:640px;background:rgba(128,128,128,0.25)">'
        f'<div style="{_BAR};width:{share:.1%};background:#4c8dd6"></div></div>'
    )


def _bundle(text: str, content: str) -> dict[str, str]:
    return {
        "text/plain": printable(text),
        "text/html": content or f"<div>{html.escape(text)}</div>",
    }
