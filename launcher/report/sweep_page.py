"""The page of a sweep: its best run, a table, parallel coordinates, and the curves of its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from launcher.console.progress import metrics_text
from launcher.errors import RunDirError
from launcher.report.comparison import learning_figures
from launcher.report.figures import Figure, ParallelAxis, ParallelCoordinates
from launcher.report.page import Page, Section, Table, render
from launcher.runs.files import write_atomic
from launcher.runs.history import History
from launcher.runs.rundir import RunDir
from launcher.sweeps.sweep_result import SweepResult, TrialResult
from launcher.sweeps.sweep_table import cell, sweep_rows

_MAX_CURVES = 8
"""Runs whose curves are shown, the best ones: there are so many colours."""


def sweep_page(result: SweepResult) -> Page:
    """Return the page of a sweep, which may still be in progress."""
    head, *rows = sweep_rows(result)
    num_done = sum(trial.state in ("finished", "dropped") for trial in result.trials)
    cards = [("runs", str(len(result.trials))), ("finished or dropped", str(num_done))]
    num_failed = sum(trial.state == "failed" for trial in result.trials)
    if num_failed:
        cards.append(("failed", str(num_failed)))
    if (best := result.best) is not None:
        settings = " ".join(f"{name}={cell(value)}" for name, value in best.settings.items())
        cards.append(("best", f"{settings}: {metrics_text(dict(best.metrics))}"))
    sections = [
        Section(title="Runs", table=Table(head=head, rows=rows)),
        Section(title="Settings and results", figures=_coordinates(result)),
        Section(title="The best runs", figures=_curves(result)),
    ]
    return Page(
        title=f"Sweep {result.path.name}",
        facts=f"compared by {result.goal}",
        cards=cards,
        sections=[section for section in sections if section.figures or section.table],
    )


def write_sweep_page(result: SweepResult) -> Path:
    """Write report.html into the folder of a sweep and return its path.

    Raises:
        RunDirError: The folder is not writable.
    """
    path = RunDir(result.path).report
    write_atomic(path, render(sweep_page(result)))
    return path


def _coordinates(result: SweepResult) -> list[Figure]:
    """Return the figure with one line for each run that has a value of the metric."""
    trials = [trial for trial in result.ranked if math.isfinite(trial.value)]
    if not trials:
        return []
    names = list(trials[0].settings)
    axes = [
        ParallelAxis(name=name, values=[_coordinate(trial.settings[name]) for trial in trials])
        for name in names
    ]
    axes.append(ParallelAxis(name=result.goal.name, values=[trial.value for trial in trials]))
    return [
        ParallelCoordinates(
            title=f"settings and {result.goal.name} of each run",
            axes=axes,
            names=[f"run {trial.run_dir.path.name}" for trial in trials],
            largest_is_best=result.goal.mode == "max",
        )
    ]


def _coordinate(value: object) -> float | str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else cell(value)  # type: ignore[arg-type]


def _curves(result: SweepResult) -> list[Figure]:
    best = [trial for trial in result.ranked if trial.step][:_MAX_CURVES]
    return learning_figures(*_histories(best)) if best else []


def _histories(trials: Sequence[TrialResult]) -> tuple[list[History], list[str]]:
    """Return the histories of runs, without those that cannot be read, and their names."""
    histories, names = [], []
    for trial in trials:
        try:
            histories.append(trial.history)
        except RunDirError:
            continue
        names.append(" ".join(f"{name}={cell(value)}" for name, value in trial.settings.items()))
    return histories, names
