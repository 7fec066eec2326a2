"""The page of several runs: what sets them apart first, then their curves on each other."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from launcher.analysis.time_shares import mean_own_seconds, smoothed, step_parts, utilisation
from launcher.console.plots import Curve, Plot
from launcher.console.progress import metrics_text
from launcher.quantities import duration, size
from launcher.report.figures import Bars, Figure
from launcher.report.page import Page, Section, Table
from launcher.report.run_page import evaluation_curves, metric_names, over_steps
from launcher.runs.history import History

_DERIVED = (
    "nodes",
    "nproc_per_node",
    "backend",
    "batch_size",
    "micro_batch_size",
    "accumulation_steps",
    "lr",
    "total_steps",
    "workers_per_rank",
    "pin_memory",
    "threads_per_rank",
)
"""Numbers of a plan that are compared besides its settings."""

_PLANNED = "planned "


def comparison_page(histories: Sequence[History], more: Sequence[Section] = ()) -> Page:
    """Return the page of several runs.

    Args:
        histories: The runs, in the order in which they are shown.
        more: Sections that end the page.
    """
    names = short_names(histories)
    recipes = ", ".join(dict.fromkeys(history.plan.recipe for history in histories))
    different = differences(histories)
    words = "The runs have the same settings." if not different else ""
    table = Table(head=("", *names), rows=different) if different else None
    sections = [
        Section(title="What sets them apart", words=words, table=table),
        Section(title="What they came to", table=_results(histories, names)),
        Section(title="Learning", figures=_learning(histories, names)),
        Section(title="Learning rate and gradient", figures=_hyperparameters(histories, names)),
        Section(title="Speed", figures=_speed(histories, names)),
        *more,
    ]
    return Page(
        title=f"{recipes}: {len(histories)} runs",
        facts=", ".join(names),
        sections=[each for each in sections if each.figures or each.table or each.words],
    )


def short_names(histories: Sequence[History]) -> list[str]:
    """Return a name for each run: its folder's, with as much before it as tells them apart."""
    paths = [history.run_dir.path.parts for history in histories]
    for length in itertools.count(1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(set(paths)) or length > max(map(len, paths)):
            break
    return names


def differences(histories: Sequence[History]) -> list[list[str]]:
    """Return (name, value in each run) of all that was set or planned differently."""
    values = [_compared(history) for history in histories]
    names = dict.fromkeys(itertools.chain.from_iterable(values))
    rows: list[list[str]] = []
    for name in names:
        shown = [_plain(each.get(name, "")) for each in values]
        repeats = name.startswith(_PLANNED) and any(row[1:] == shown for row in rows)
        if len(set(shown)) > 1 and not repeats:
            rows.append([name, *shown])
    return rows


def _compared(history: History) -> dict[str, Any]:
    plan = history.plan.to_dict()
    record = history.record
    settings = dict(history.plan.settings)
    own = {f"{_PLANNED}{name}" if name in settings else name: plan[name] for name in _DERIVED}
    parameters = {k: v for k, v in record.overrides.items() if k not in settings}
    around = {"recipe": record.recipe} | {
        f"version of {name}": version for name, version in record.versions.items()
    }
    code: dict[str, Any] = {"git commit": "", "changed files": ""}
    if record.git is not None:
        code = {"git commit": record.git.commit, "changed files": record.git.changed_files}
    return settings | parameters | own | around | code


def _results(histories: Sequence[History], names: Sequence[str]) -> Table:
    rows: list[list[str]] = []

    def add(what: str, value: Callable[[History], str]) -> None:
        cells = [value(history) for history in histories]
        if any(cells):
            rows.append([what, *cells])

    add("state", lambda history: history.state.name)
    add("steps", lambda history: f"{history.last_step:,} of {history.total_steps:,}")
    add("held-out", lambda h: metrics_text(h.evaluations[-1][1]) if h.evaluations else "")
    add("training loss", lambda h: f"{smoothed(h.steps['loss'])[-1]:.4g}" if h.last_step else "")
    add("at work", lambda h: _or_nothing(h.seconds_at_work(), duration))
    add("samples/s", lambda h: _or_nothing(h.typical("samples_per_second"), "{:,.0f}".format))
    for what in ("model operations of a rank", "model FLOPs utilisation"):
        add(what, functools.partial(_utilised, what))
    add("memory of a rank", lambda h: size(max(h.ranks[-1].memory_bytes)) if h.ranks else "")
    add("attempts", lambda h: str(len(h.attempts())) if h.events else "")
    return Table(head=("", *names), rows=rows)


def _learning(histories: Sequence[History], names: Sequence[str]) -> list[Figure]:
    figures: list[Figure] = []
    with_steps = [(h, name) for h, name in zip(histories, names, strict=True) if h.last_step]
    if not with_steps:
        return figures
    losses = [
        Curve(name=name, xs=h.steps["step"], ys=smoothed(h.steps["loss"])) for h, name in with_steps
    ]
    figures.append(over_steps("training loss, smoothed", "loss", losses))
    if len({h.plan.batch_size for h, _ in with_steps}) > 1:
        curves = [
            Curve(name=name, xs=h.steps["samples"], ys=smoothed(h.steps["loss"]))
            for h, name in with_steps
        ]
        title = "training loss over the samples, smoothed"
        figures.append(Plot(title=title, x_label="samples", y_label="loss", curves=curves))
    timed = [(h, n) for h, n in with_steps if math.isfinite(h.steps["time"][0])]
    if timed:
        curves = [
            Curve(name=name, xs=seconds_at_steps(h), ys=smoothed(h.steps["loss"]))
            for h, name in timed
        ]
        title = "training loss over the time at work, smoothed"
        figures.append(Plot(title=title, x_label="seconds", y_label="loss", curves=curves))
    for metric in ["loss", *metric_names(histories)]:
        curves = [
            curve
            for history, name in zip(histories, names, strict=True)
            for curve in evaluation_curves(history, metric, name)
        ]
        if curves:
            figures.append(over_steps(f"held-out {metric}", metric, curves))
    noisy = [
        Curve(name=name, xs=[s for s, _ in h.noise], ys=[scale for _, scale in h.noise])
        for h, name in with_steps
        if h.noise
    ]
    if noisy:
        figures.append(over_steps("gradient noise scale", "items", noisy, log_y=True))
    return figures


def seconds_at_steps(history: History) -> list[float]:
    """Return the time at work until each step, without what lies between attempts."""
    attempts = history.attempts()
    out = []
    index, before = 0, 0.0
    for when in history.steps["time"]:
        while index + 1 < len(attempts) and when >= attempts[index + 1].began["time"]:
            before += attempts[index].until - attempts[index].began["time"]
            index += 1
        start = attempts[index].began["time"] if attempts else history.steps["time"][0]
        out.append(before + when - start)
    return out


def _hyperparameters(histories: Sequence[History], names: Sequence[str]) -> list[Figure]:
    figures: list[Figure] = []
    titles = {"lr": "learning rate", "momentum": "momentum", "grad_norm": "norm of the gradient"}
    for column, title in titles.items():
        curves = [
            Curve(name=name, xs=history.steps["step"], ys=history.steps[column])
            for history, name in zip(histories, names, strict=True)
            if any(map(math.isfinite, history.steps[column]))
        ]
        if curves:
            figures.append(over_steps(title, column, curves, log_y=column == "grad_norm"))
    return figures


def _speed(histories: Sequence[History], names: Sequence[str]) -> list[Figure]:
    figures: list[Figure] = []
    rates = [
        Curve(name=name, xs=h.steps["step"], ys=h.steps["samples_per_second"])
        for h, name in zip(histories, names, strict=True)
        if h.last_step
    ]
    if rates:
        figures.append(over_steps("samples a second, over all ranks", "samples/s", rates))
    shares: dict[str, list[float]] = {}
    for history in histories:
        for what, values in step_parts(history).items():
            known = [value for value in values[len(values) // 10 :] if math.isfinite(value)]
            shares.setdefault(what, []).append(1e3 * sum(known) / max(len(known), 1))
    for what, values in shares.items():
        if len(values) == len(names) and any(values):
            title = f"{what}, in a step on average"
            figures.append(
                Bars(title=title, x_label="run", y_label="ms", names=names, values=values)
            )
    slowest = [max(own) if (own := mean_own_seconds(h)) else math.nan for h in histories]
    if all(map(math.isfinite, slowest)):
        title = "the slowest rank's own part of a step"
        values = [1e3 * value for value in slowest]
        figures.append(Bars(title=title, x_label="run", y_label="ms", names=names, values=values))
    return figures


def _utilised(what: str, history: History) -> str:
    flops = history.flops_per_second()
    name, value = ("", "") if flops is None else utilisation(history, flops)
    return value if name == what else ""


def _or_nothing(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
