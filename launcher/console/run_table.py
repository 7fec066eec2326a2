"""Runs as rows: what they are, how they fare, what they came to."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.console.progress import metrics_text
from launcher.console.tables import table
from launcher.errors import RunDirError, UsageError, did_you_mean
from launcher.quantities import duration
from launcher.runs.history import History
from launcher.runs.rundir import RunDir
from launcher.runs.status import STATES, read_run_state

_BYTES = 1 << 16
"""Of metrics.jsonl, where the last step and the last evaluation are."""

_HEAD = ("run", "state", "recipe", "ranks", "step", "result", "took", "began")


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run in a list of runs."""

    run: str
    """Its folder."""

    state: str
    words: str
    """What more there is to say of its state."""

    recipe: str
    ranks: int
    strategy: str
    step: int
    total_steps: int
    result: dict[str, float]
    """Of its last evaluation; its loss where there was none."""

    seconds: float | None
    """At work, over all its attempts."""

    began: float | None
    """In seconds since 1970."""

    settings: dict[str, Any]


def listed(run_dir: RunDir) -> RunRow | None:
    """Return a run as a row; one that has only been submitted, or is damaged, says so.

    What a finder has measured is no run.
    """
    try:
        history = History(run_dir, newest=_BYTES)
    except RunDirError as error:
        waits = run_dir.submission.is_file() and not run_dir.run_yaml.exists()
        state = read_run_state(run_dir)
        return RunRow(
            run=run_dir.shown,
            state=state.name if waits else "unknown",
            words=state.words if waits else str(error),
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
    if history.result is not None:
        result = history.result["evaluation"] or {"loss": history.result["train_loss"]}
    elif history.evaluations:
        result = history.evaluations[-1][1]
    else:
        result = {"loss": column[-1]} if (column := history.steps["loss"]) else {}
    return RunRow(
        run=run_dir.shown,
        state=history.state.name,
        words=history.state.words,
        recipe=plan.recipe,
        ranks=plan.world_size,
        strategy=plan.strategy,
        step=history.last_step,
        total_steps=history.total_steps,
        result={name: math.nan if value is None else value for name, value in result.items()},
        seconds=history.seconds_at_work(),
        began=next((each["time"] for each in history.events), None),
        settings=dict(plan.settings),
    )


def chosen(rows: Iterable[RunRow], filters: Sequence[tuple[str, str]]) -> list[RunRow]:
    """Return the rows of which every filter (name, value) holds.

    Raises:
        UsageError: No row has such a name.
    """
    rows = list(rows)
    known = {name for row in rows for name in _values(row)}
    for name, _ in filters:
        if rows and name not in known:
            raise UsageError(f"No run has a {name}.{did_you_mean(name, known)}")
    return [
        row for row in rows if all(_equal(_values(row).get(name), text) for name, text in filters)
    ]


def ordered(rows: Sequence[RunRow], by: str, *, reverse: bool) -> list[RunRow]:
    """Return the rows in the order of a value, those that do not have it last.

    Raises:
        UsageError: No row has it.
    """
    known = {name for row in rows for name in _values(row)}
    if rows and by not in known:
        raise UsageError(f"No run has a {by} to sort by.{did_you_mean(by, known)}")

    def key(row: RunRow) -> tuple[bool, float, str]:
        value = _values(row)[by]
        if by == "state":
            return False, STATES.index(row.state), ""
        if isinstance(value, (int, float)):
            return False, float(value), ""
        return True, 0.0, str(value)

    def has(row: RunRow) -> bool:
        value = _values(row).get(by)
        return value is not None and not (isinstance(value, float) and math.isnan(value))

    having = sorted(filter(has, rows), key=key, reverse=reverse)
    return having + [row for row in rows if not has(row)]


def lines(rows: Sequence[RunRow]) -> list[str]:
    """Return the rows as a table."""
    cells = [_HEAD, *(_cells(row) for row in rows)]
    return table(cells, "<<<>><><")


def to_dict(row: RunRow) -> dict[str, Any]:
    """Return a row as values that JSON can hold."""
    values = asdict(row)
    finite = {k: v if math.isfinite(v) else None for k, v in row.result.items()}
    return values | {"result": finite}


def _cells(row: RunRow) -> tuple[str, ...]:
    result = metrics_text(row.result)
    began = "" if row.began is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(row.began))
    words = row.words.removeprefix("failed on ") if row.state in ("unknown", "failed") else result
    return (
        row.run,
        row.state,
        row.recipe,
        f"{row.ranks} {row.strategy}" if row.ranks else "",
        f"{row.step:,}/{row.total_steps:,}" if row.total_steps else "",
        words if len(words) <= 60 else words[:57] + "...",
        "" if row.seconds is None else duration(row.seconds),
        began,
    )


def _values(row: RunRow) -> dict[str, Any]:
    """Return all that a row can be chosen and sorted by, the stronger names last."""
    own = {name: value for name, value in asdict(row).items() if name not in ("settings", "result")}
    return row.settings | row.result | own


def _equal(value: Any, text: str) -> bool:
    if isinstance(value, bool) or value is None:
        return str(value).lower() == text.lower()
    if isinstance(value, (int, float)):
        try:
            return math.isclose(value, float(text), rel_tol=1e-9)
        except ValueError:
            return False
    return str(value).lower() == text.lower()
