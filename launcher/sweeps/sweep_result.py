"""What a sweep came to, read from the folders of its runs."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_FAILED, EXIT_RESUMABLE, RunDirError
from launcher.recipe.metric_goal import MetricGoal, read_goal
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.failure_record import read_failure
from launcher.runs.final_result import find_result
from launcher.runs.history import History
from launcher.runs.rundir import RunDir
from launcher.sweeps.sweep_record import SweepRecord, TrialRecord, TrialState, read_sweep

_TAIL_BYTES = 1 << 16
"""Bytes read from the end of metrics.jsonl, which hold the last evaluation."""

_ORDER: tuple[TrialState, ...] = ("finished", "dropped", "stopped", "failed", "waiting")


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What one run of a sweep came to."""

    index: int
    """Place of the run in the grid, from 0."""

    settings: Mapping[str, Any]
    """The values that distinguish the run, by the names of the settings."""

    run_dir: RunDir
    """The run folder; it does not exist before the run has started."""

    state: TrialState
    """finished; dropped by the stop rule; stopped by a signal; failed; or waiting to start."""

    step: int
    """Optimizer steps taken."""

    metrics: Mapping[str, float]
    """Loss and metrics of the last evaluation by name; empty if there was none."""

    value: float
    """The metric by which the runs are compared; NaN if it is unknown."""

    error: str = ""
    """Why the run failed; empty if it has not."""

    @property
    def history(self) -> History:
        """The steps, evaluations and events of the run, read from its folder."""
        return History(self.run_dir)

    def to_record(self) -> TrialRecord:
        """Return the result as sweep.json holds it."""
        return TrialRecord(
            index=self.index,
            settings=self.settings,
            state=self.state,
            step=self.step,
            metrics=self.metrics,
            error=self.error,
        )


@dataclass(frozen=True, kw_only=True)
class SweepResult(Sequence[TrialResult]):
    """The runs of a sweep in the order of the grid: a sequence of `TrialResult`s."""

    path: Path
    """The folder of the sweep, with sweep.json and a folder for each run."""

    goal: MetricGoal
    """The metric by which runs are compared."""

    trials: tuple[TrialResult, ...]
    """The runs, in the order of the grid."""

    stopped_by: signal.Signals | None = None
    """The signal that stopped the sweep; None if no signal did."""

    @property
    def ranked(self) -> list[TrialResult]:
        """The runs from the best to the worst: first those that finished, by the metric."""
        return sorted(
            self.trials,
            key=lambda trial: (
                _ORDER.index(trial.state),
                -trial.step if trial.state == "dropped" else 0,
                self.goal.key(trial.value),
                trial.index,
            ),
        )

    @property
    def best(self) -> TrialResult | None:
        """The finished run with the best metric; None if none has finished with a metric."""
        first = next(iter(self.ranked), None)
        is_best = first is not None and first.state == "finished" and not math.isnan(first.value)
        return first if is_best else None

    @property
    def finished(self) -> bool:
        """Whether every run has finished or was dropped by the stop rule."""
        return all(trial.state in ("finished", "dropped") for trial in self.trials)

    @property
    def exit_code(self) -> int:
        """The exit code of a command that ends with this result.

        0 if every run has finished or was dropped, 75 if runs were stopped and can be resumed, and
        1 if a run failed.
        """
        states = {trial.state for trial in self.trials}
        if self.stopped_by is not None or states & {"stopped", "waiting"}:
            return EXIT_RESUMABLE
        return EXIT_FAILED if "failed" in states else 0

    def __len__(self) -> int:
        return len(self.trials)

    def __getitem__(self, index: Any) -> Any:
        return self.trials[index]

    def __iter__(self) -> Iterator[TrialResult]:
        return iter(self.trials)


def trial_folder(folder: Path, index: int, num_trials: int) -> Path:
    """Return the run folder of a run of a sweep: `0` to `5`, or `00` to `11`."""
    return folder / f"{index:0{len(str(num_trials - 1))}}"


def read_trial(
    folder: Path,
    settings: Mapping[str, Any],
    index: int,
    goal: MetricGoal,
    *,
    dropped: bool,
    error: str = "",
) -> TrialResult:
    """Return what a run has come to so far, from its folder.

    Args:
        folder: The run folder.
        settings: The values that distinguish the run.
        index: Its place in the grid.
        goal: The metric by which runs are compared.
        dropped: Whether the stop rule has dropped it.
        error: Why it failed, if its folder does not tell.
    """
    run_dir = RunDir(folder.resolve())
    result = find_result(run_dir)
    metrics: Mapping[str, float | None] = {}
    if result is not None:
        state: TrialState = "finished"
        step, metrics = result.steps, result.metrics
    else:
        step = checkpoints[0].step if (checkpoints := list_checkpoints(run_dir)) else 0
        with contextlib.suppress(RunDirError):
            history = History(run_dir, newest=_TAIL_BYTES)
            step = max(step, history.last_step)
            metrics = history.latest_evaluation
        error = _failure(run_dir) or error
        has_begun = run_dir.run_yaml.exists()
        state = "failed" if error else "stopped" if has_begun else "waiting"
        if dropped:
            state = "failed" if error else "dropped"
    numbers = {name: math.nan if value is None else value for name, value in metrics.items()}
    return TrialResult(
        index=index,
        settings=dict(settings),
        run_dir=run_dir,
        state=state,
        step=step,
        metrics=numbers,
        value=numbers.get(goal.name, math.nan),
        error="" if state == "finished" else error,
    )


def read_result_of_sweep(folder: Path) -> SweepResult:
    """Return what a sweep has come to so far, from its folder.

    Raises:
        RunDirError: It is not the folder of a sweep, or sweep.json is damaged.
    """
    return result_of(read_sweep(folder), folder)


def result_of(record: SweepRecord, folder: Path) -> SweepResult:
    """Return what a sweep has come to so far.

    Args:
        record: Its sweep.json, which names every run.
        folder: Its folder.
    """
    goal = read_goal(record.metric, where="sweep.json")
    dropped = {
        index for choice in record.choices for index in choice.tried if index not in choice.kept
    }
    trials = tuple(
        read_trial(
            trial_folder(folder, trial.index, len(record.trials)),
            trial.settings,
            trial.index,
            goal,
            dropped=trial.index in dropped,
            error=trial.error,
        )
        for trial in record.trials
    )
    return SweepResult(path=folder.resolve(), goal=goal, trials=trials)


def _failure(run_dir: RunDir) -> str:
    """Return why the last attempt of a run failed; empty if it did not."""
    try:
        failure = read_failure(run_dir)
    except RunDirError as error:
        return str(error)
    if failure is None:
        return ""
    head = failure.message.partition("\n")[0]
    return f"rank {failure.rank}: {failure.error}: {head}".rstrip(": ")
