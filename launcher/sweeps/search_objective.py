"""One run as a function that returns a metric, for Optuna and other searches.

A search may want to end a run early, which is called pruning. The run is then a process of its own:
this process reads its evaluations as they are recorded, passes them to the search, and stops the
run when the search asks for it.
"""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from launcher.errors import (
    EXIT_RESUMABLE,
    EXIT_USAGE,
    RunDirError,
    TrainingError,
    UsageError,
    did_you_mean,
)
from launcher.recipe.overrides import Override
from launcher.recipe.resolve import Reference
from launcher.recipe.validation import brief
from launcher.runs.failure_record import RunFailedError, read_failure
from launcher.runs.history import History
from launcher.runs.run_result import RunResult, read_run_result
from launcher.runs.rundir import RunDir, planned_path
from launcher.sweeps.shares import Share
from launcher.sweeps.sweeper import Stopping
from launcher.sweeps.trial_process import TrialProcess, TrialTask

_SECONDS_BETWEEN_LOOKS = 0.2


class PrunableTrial(Protocol):
    """What a search gives for a run that it may end early; an Optuna trial is one."""

    def report(self, value: float, step: int) -> None:
        """Receive the metric of an evaluation after `step` steps."""

    def should_prune(self) -> bool:
        """Return whether the run should end now."""


def value_of(result: RunResult, metric: str) -> float:
    """Return a metric of a run that has finished.

    Raises:
        UsageError: The run has no such metric.
        TrainingError: The run was stopped before its end.
    """
    if not result.finished:
        raise TrainingError(
            f"The run was stopped after step {result.step:,}, and has no result. Continue it with "
            f"launcher.resume({str(result.run_dir.path)!r})."
        )
    if metric not in result.metrics:
        known = ", ".join(result.metrics) or "none, because it has no evaluation data"
        raise UsageError(
            f"metric={brief(repr(metric))}: the metrics of the run are {known}."
            f"{did_you_mean(metric, result.metrics)}"
        )
    return result.metrics[metric]


def run_prunable(
    reference: Reference,
    overrides: tuple[Override, ...],
    trial: PrunableTrial,
    metric: str,
    *,
    nproc_per_node: int | None,
    out: Path | None,
) -> RunResult:
    """Train a run in a process of its own, and stop it when the search asks for it.

    Args:
        reference: The recipe.
        overrides: Values for the recipe.
        trial: Receives the metric of each evaluation and says when to stop.
        metric: Name of the metric.
        nproc_per_node: Ranks; None is one for each GPU, or 2.
        out: The run folder to make; None makes one below runs/.

    Raises:
        RunFailedError: A rank failed.
        UsageError: The recipe, an override or the folder is wrong.
        KeyboardInterrupt: Ctrl-C stopped the run.
        TrialPruned: The search ended the run; the exception is Optuna's.
    """
    pruned = _trial_pruned()
    folder = planned_path(out, reference.name).absolute()
    if folder.exists():
        raise RunDirError(f"The run folder {folder} exists already. Give another out=...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    task = TrialTask(
        recipe=reference.location,
        overrides=overrides,
        nproc_per_node=nproc_per_node,
        folder=folder,
        log=Path(os.devnull),
        share=Share(gpus=(), cores=()),
        pause_after=None,
        parent=os.getpid(),
    )
    watched = _Watched(RunDir(folder), trial, metric)
    with Stopping(announces=False) as stopping:
        process = TrialProcess(task)
        stopping.processes.append(process)
        while process.exit_code is None:
            wait([process.sentinel], timeout=_SECONDS_BETWEEN_LOOKS)
            if watched.looks_hopeless():
                process.signal(signal.SIGTERM)
        error = process.close()
    if watched.is_pruned:
        raise pruned(f"pruned after step {watched.last_step:,}")
    if stopping.stopped_by is signal.SIGINT:
        raise KeyboardInterrupt
    return _result(RunDir(folder), process.exit_code or 0, error, stopping.stopped_by)


class _Watched:
    """A run whose evaluations are passed to a search as they are recorded.

    Args:
        run_dir: The run folder, which may not exist yet.
        trial: The search.
        metric: Name of the metric.
    """

    def __init__(self, run_dir: RunDir, trial: PrunableTrial, metric: str) -> None:
        self.is_pruned = False
        """Whether the search has ended the run."""
        self.last_step = 0
        """The step of the last evaluation that has the metric."""
        self._run_dir, self._trial, self._metric = run_dir, trial, metric
        self._history: History | None = None

    def looks_hopeless(self) -> bool:
        """Report new evaluations; return whether the search has just ended the run."""
        if self.is_pruned:
            return False
        try:
            if self._history is None:
                self._history = History(self._run_dir)
            else:
                self._history.refresh()
        except RunDirError:  # the run has not begun, or writes run.yaml at this moment
            return False
        for step, values in self._history.evaluations:
            if step <= self.last_step or step == self._history.total_steps:
                continue
            if self._metric not in values:  # another set was evaluated
                continue
            self.last_step = step
            self._trial.report(values[self._metric], step)
            if self._trial.should_prune():
                self.is_pruned = True
                return True
        return False


def _result(
    run_dir: RunDir, exit_code: int, error: str, stopped_by: signal.Signals | None
) -> RunResult:
    """Return the result of a run whose process has ended.

    Raises:
        LauncherError: The run failed.
    """
    if exit_code in (0, EXIT_RESUMABLE):
        return read_run_result(run_dir, exit_code, stopped_by)
    if (failure := read_failure(run_dir)) is not None:
        raise RunFailedError(error or failure.message, failure)
    if exit_code == EXIT_USAGE:
        raise UsageError(error)
    raise TrainingError(error or f"The process of the run ended with exit code {exit_code}.")


def _trial_pruned() -> type[Any]:
    """Return Optuna's exception for a run that was ended early.

    Raises:
        UsageError: Optuna is not installed.
    """
    try:
        from optuna import TrialPruned
    except ImportError:
        raise UsageError(
            "objective(trial=...) needs Optuna, which is not installed: run "
            "`python -m pip install optuna`."
        ) from None
    return TrialPruned  # type: ignore[no-any-return]
