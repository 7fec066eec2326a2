"""What notebooks show of runs: results, histories and failures as HTML.

Jupyter asks a value for its HTML (`_repr_html_`). Every text is escaped, because names, messages
and logs may hold anything.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from launcher.printable import printable
from launcher.quantities import measured
from launcher.svg import svg_plot

if TYPE_CHECKING:
    from launcher.runs.history import History
    from launcher.runs.run_result import RunResult

_CONTEXT = ("last seen: ", "next: ", "log: ")
"""Beginnings of the paragraphs at the end of a post-mortem."""

_CELL = "text-align:left;padding:1px 12px 1px 0"


def result_html(result: RunResult) -> str:
    """Return the end of a run, its metrics, and how to continue a run that was stopped."""
    folder = result.run_dir.shown
    if result.finished:
        end = f"finished after {result.step:,} steps"
    else:
        signal = f" by {result.stopped_by.name}" if result.stopped_by is not None else ""
        end = f"stopped{signal} after step {result.step:,}"
    rows = {"run": end, **_metric_rows(result.metrics), "run folder": folder}
    if not result.finished:
        rows["to continue"] = f"launcher.resume({folder!r})"
    return table_html(rows)


def history_html(history: History) -> str:
    """Return the state of a run, its last evaluation, and its losses as a plot."""
    plan = history.plan
    rows = {
        "run": f"{plan.recipe}, {history.state.words}",
        "steps": f"{history.last_step:,} of {history.total_steps:,}",
        "run folder": history.run_dir.shown,
    }
    if history.evaluations:
        step, values = history.evaluations[-1]
        rows[f"evaluation after step {step:,}"] = metrics_line(values)
    return table_html(rows) + losses_svg(history)


def failure_html(text: str) -> str:
    """Return a post-mortem: what failed, its traceback, and what follows from it.

    Args:
        text: The post-mortem as text, in paragraphs.
    """
    paragraphs = printable(text).strip().split("\n\n")
    context = [part for part in paragraphs[1:] if part.startswith(_CONTEXT)]
    body = "\n\n".join(part for part in paragraphs[1:] if not part.startswith(_CONTEXT))
    rows = dict(part.split(": ", 1) for part in context)
    return (
        f'<div style="color:#c0392b;font-weight:bold">{html.escape(paragraphs[0])}</div>'
        + (f'<pre style="overflow-x:auto">{html.escape(body)}</pre>' if body else "")
        + table_html(rows)
    )


def losses_svg(history: History) -> str:
    """Return the losses of training and of the evaluations over the steps; empty without steps."""
    if not history.last_step:
        return ""
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    curves["training"] = (history.steps["step"], history.steps["loss"])
    losses = [(step, values.get("loss", math.nan)) for step, values in history.evaluations]
    if any(math.isfinite(loss) for _, loss in losses):
        curves["evaluation"] = ([step for step, _ in losses], [loss for _, loss in losses])
    return svg_plot(curves, "step", "loss")


def table_html(rows: Mapping[str, str]) -> str:
    """Return names and values as a table without lines."""
    if not rows:
        return ""
    cells = (
        f'<tr><th style="{_CELL}">{html.escape(printable(name))}</th>'
        f'<td style="{_CELL}">{html.escape(printable(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def metrics_line(values: Mapping[str, float]) -> str:
    """Return metrics on one line, the loss last."""
    return ", ".join(f"{name} {value}" for name, value in _metric_rows(values).items())


def _metric_rows(values: Mapping[str, float]) -> dict[str, str]:
    names: Iterable[str] = sorted(values, key=lambda name: (name == "loss", name))
    return {name: measured(values[name]) for name in names}
