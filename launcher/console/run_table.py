"""The rows of `launcher runs`: reading them from run folders, filtering, sorting, printing."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.console.progress import metrics_text
from launcher.console.tables import table
from launcher.errors import RunDirError, UsageError, did_you_mean
from launcher.paths import is_file
from launcher.printable import printable
from launcher.quantities import duration
from launcher.runs.history import History
from launcher.runs.rundir import RunDir
from launcher.runs.status import STATES, read_run_state

_TAIL_BYTES = 1 << 16
"""Bytes read from the end of metrics.jsonl: enough for the last step and the last evaluation."""

_HEADER = ("run", "state", "recipe", "ranks", "step", "result", "took", "began")


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run in a table of runs."""

    run: str
    """The run folder."""

    state: str
    """One of `launcher.runs.status.STATES`."""

    words: str
    """Details of the state, such as the error of a failed run."""

    recipe: str
    """Name of the recipe; `?` if it is unknown, as are the next fields then."""

    ranks: int
    """Number of ranks; 0 if unknown."""

    strategy: str
    step: int
    """Number of completed steps."""

    total_steps: int
    """Number of planned steps; 0 if unknown."""

    result: dict[str, float]
    """Metrics of the last evaluation, or the training loss if there was none."""

    seconds: float | None
    """Time that the ranks have worked, over all attempts."""

    began: float | None
    """Start of the first attempt in seconds since 1970."""

    settings: dict[str, Any]
    """Values of the recipe's settings."""


def read_row(run_dir: RunDir) -> RunRow | None:
    """Read the row of a run folder.

    A folder that cannot be read gives a row all the same: its state is that of its Slurm job if
    the run has been submitted and has not started, and `unknown` otherwise.

    Returns:
        The row, or None if the folder holds the measurements of a finder and not a run.
    """
    try:
        history = History(run_dir, newest=_TAIL_BYTES)
    except RunDirError as error:
        is_queued = is_file(run_dir.submission) and not os.path.lexists(run_dir.run_yaml)
        state = read_run_state(run_dir)
        return RunRow(
            run=run_dir.shown,
            state=state.name if is_queued else "unknown",
            words=state.words if is_queued else _without_folder(str(error), run_dir),
            recipe="?",
            ranks=0,
            strategy="?",
            step=0,
            total_steps=0,
            result={},
            seconds=None,
            began=None,
            settings={},
        )
    if history.record.probe:
        return None
    plan = history.plan
    result: dict[str, float | None]
    if history.result is not None:
        result = history.result.metrics
    elif history.evaluations:
        result = dict(history.latest_evaluation)
    else:
        result = {"loss": column[-1]} if (column := history.steps["loss"]) else {}
    return RunRow(
        run=run_dir.shown,
        state=history.state.name,
        words=_without_folder(history.state.words, run_dir),
        recipe=plan.recipe,
        ranks=plan.world_size,
        strategy=plan.strategy,
        step=history.last_step,
        total_steps=history.total_steps,
        result={name: math.nan if value is None else value for name, value in result.items()},
        seconds=history.active_seconds(),
        began=history.began,
        settings=dict(plan.settings),
    )


def _without_folder(words: str, run_dir: RunDir) -> str:
    """Return an error about a file of a run by its name in the folder, which the row names."""
    return words.replace(f"{run_dir.path}/", "")


def filter_rows(rows: Iterable[RunRow], filters: Sequence[tuple[str, str]]) -> list[RunRow]:
    """Return the rows that satisfy every filter.

    Args:
        rows: The rows.
        filters: Pairs (name, value): a field of `RunRow`, a metric or a setting, and its value as
            text. Numbers are compared as numbers, everything else without regard to case.

    Raises:
        UsageError: No row has a value of that name, or a value is no state.
    """
    rows = list(rows)
    names = {name for row in rows for name in _values(row)}
    for name, text in filters:
        if name == "state" and text.lower() not in STATES:
            raise UsageError(
                f"state={printable(text)}: expected one of {', '.join(STATES)}."
                f"{did_you_mean(text, STATES)}"
            )
        if rows and name not in names:
            raise UsageError(
                f"No run has a field, metric or setting named {name!r}.{did_you_mean(name, names)}"
            )
    return [
        row for row in rows if all(_equal(_values(row).get(name), text) for name, text in filters)
    ]


def sort_rows(rows: Sequence[RunRow], by: str, *, reverse: bool) -> list[RunRow]:
    """Return the rows sorted by one value. Rows without that value, or with NaN, come last.

    Args:
        rows: The rows.
        by: A field of `RunRow`, a metric or a setting. States sort in the order of `STATES`.
        reverse: Whether the largest value comes first.

    Raises:
        UsageError: No row has a value of that name.
    """
    names = {name for row in rows for name in _values(row)}
    if rows and by not in names:
        raise UsageError(
            f"Cannot sort by {by!r}: no run has a field, metric or setting of that name."
            f"{did_you_mean(by, names)}"
        )

    def key(row: RunRow) -> tuple[bool, float, str]:
        value = _values(row)[by]
        if by == "state":
            return False, STATES.index(row.state), ""
        if isinstance(value, (int, float)):
            return False, float(value), ""
        return True, 0.0, str(value)

    def has_value(row: RunRow) -> bool:
        value = _values(row).get(by)
        return value is not None and not (isinstance(value, float) and math.isnan(value))

    sortable = sorted(filter(has_value, rows), key=key, reverse=reverse)
    return sortable + [row for row in rows if not has_value(row)]


def table_lines(rows: Sequence[RunRow]) -> list[str]:
    """Return the lines of the table, a header first."""
    cells = [_HEADER, *(tuple(map(_one_line, _cells(row))) for row in rows)]
    return table(cells, "<<<>><><")


def row_values(row: RunRow) -> dict[str, Any]:
    """Return a row as JSON-compatible values. Metrics that are not finite become None."""
    result = {name: value if math.isfinite(value) else None for name, value in row.result.items()}
    return asdict(row) | {"result": result}


def _cells(row: RunRow) -> tuple[str, ...]:
    began = "" if row.began is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(row.began))
    is_broken = row.state in ("unknown", "failed")
    result = row.words.removeprefix("failed on ") if is_broken else metrics_text(row.result)
    return (
        row.run,
        row.state,
        row.recipe,
        f"{row.ranks} {row.strategy}" if row.ranks else "",
        f"{row.step:,}/{row.total_steps:,}" if row.total_steps else "",
        result if len(result) <= 60 else result[:57] + "...",
        "" if row.seconds is None else duration(row.seconds),
        began,
    )


def _one_line(text: str) -> str:
    return printable(text.replace("\n", " ").replace("\t", " "))


def _values(row: RunRow) -> dict[str, Any]:
    """Return the values to filter and sort by. Fields hide metrics, which hide settings."""
    fields = asdict(row)
    del fields["settings"], fields["result"]
    return row.settings | row.result | fields


def _equal(value: Any, text: str) -> bool:
    """Return whether a value equals the value that a user typed."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() == text.lower()
    if isinstance(value, (int, float)):
        try:
            return math.isclose(value, float(text), rel_tol=1e-9)
        except ValueError:
            return False
    return str(value).lower() == text.lower()
