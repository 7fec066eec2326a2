"""What a run came to, as a value for Python programs."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.runs.events import Stopped, read_events
from launcher.runs.final_result import BestResult, find_result
from launcher.runs.history import History
from launcher.runs.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A run that has finished, or that was stopped and can be resumed."""

    run_dir: RunDir
    """The run folder; `run_dir.path` is its path."""

    finished: bool
    """Whether the run took all of its steps. If not, a signal stopped it after it had saved a
    checkpoint, from which `launcher.resume` continues."""

    step: int
    """Optimizer steps taken since the beginning of the run."""

    metrics: Mapping[str, float]
    """Loss and metrics of the final evaluation by name; empty if the run was stopped or has no
    evaluation data."""

    best: BestResult | None = None
    """The best evaluation of a finished run; None without `keep_best`."""

    stopped_by: signal.Signals | None = None
    """The signal that this process received and that stopped the run; None if the run finished, or
    if the signal was sent to its ranks alone."""

    exit_code: int = 0
    """The exit code of a command that ends with this result."""

    @property
    def history(self) -> History:
        """The steps, evaluations and events of the run, read from its folder."""
        return History(self.run_dir)

    def _repr_html_(self) -> str:
        """Return what a notebook shows of this value."""
        from launcher.runs.rich_text import result_html

        return result_html(self)


def read_run_result(
    run_dir: RunDir, exit_code: int = 0, stopped_by: signal.Signals | None = None
) -> RunResult:
    """Return what a run that has ended came to.

    Args:
        run_dir: Its folder.
        exit_code: The exit code of its ranks: 0, or `EXIT_RESUMABLE` if it was stopped.
        stopped_by: The signal that this process received, if any.
    """
    if exit_code == 0:
        result = find_result(run_dir)
        metrics = {} if result is None else result.evaluation
        return RunResult(
            run_dir=run_dir,
            finished=True,
            step=0 if result is None else result.steps,
            metrics={name: math.nan if value is None else value for name, value in metrics.items()},
            best=None if result is None else result.best,
        )
    stops = [event.step for event in read_events(run_dir) if isinstance(event, Stopped)]
    return RunResult(
        run_dir=run_dir,
        finished=False,
        step=stops[-1] if stops else 0,
        metrics={},
        stopped_by=stopped_by,
        exit_code=exit_code,
    )
