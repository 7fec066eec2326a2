"""The table of a sweep: its runs from the best to the worst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.console.tables import table
from launcher.printable import printable, shortened
from launcher.quantities import measured
from launcher.recipe.metric_goal import MetricGoal
from launcher.sweeps.sweep_result import SweepResult, TrialResult

_MAX_ERROR = 60
"""Characters of an error that a row shows."""


def metric_columns(goal: MetricGoal, trials: Sequence[TrialResult]) -> list[str]:
    """Return the metrics that are shown: the one that compares the runs first, the loss last."""
    names = sorted({name for trial in trials for name in trial.metrics} - {goal.name, "loss"})
    return list(dict.fromkeys([goal.name, *names, "loss"]))


def sweep_rows(result: SweepResult) -> list[list[str]]:
    """Return the cells of the table, a header first."""
    metrics = metric_columns(result.goal, result.trials)
    settings = list(result.trials[0].settings)
    rows = [["run", *settings, "state", "steps", *metrics]]
    has_errors = any(trial.error for trial in result.trials)
    if has_errors:
        rows[0].append("error")
    for trial in result.ranked:
        row = [
            trial.run_dir.path.name,
            *(cell(trial.settings[name]) for name in settings),
            trial.state,
            f"{trial.step:,}",
            *(_number(trial.metrics.get(name)) for name in metrics),
        ]
        rows.append([*row, _first_line(trial.error)] if has_errors else row)
    return rows


def sweep_lines(result: SweepResult) -> list[str]:
    """Return the lines of the table, a header first."""
    num_settings = len(result.trials[0].settings)
    rows = [[printable(cell) for cell in row] for row in sweep_rows(result)]
    return table(rows, "<" * (num_settings + 2) + ">" * 50)


def cell(value: Any) -> str:
    """Return the value of a setting as a cell."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return measured(value)


def _first_line(error: str) -> str:
    return shortened(error.strip().partition("\n")[0], _MAX_ERROR)
