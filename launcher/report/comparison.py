"""The page that compares several runs: differences, results, then curves over common axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from launcher.analysis.time_shares import mean_own_seconds, smoothed, step_parts, utilisation
from launcher.console.plots import Curve, Plot
from launcher.console.progress import metrics_text
from launcher.quantities import duration, size
from launcher.report.figures import Bars, Figure
from launcher.report.page import Page, Section, Table
from launcher.report.run_page import evaluation_curves, logged_curves, metric_names, over_steps
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
"""Planned values that are compared in addition to the settings."""

_PLANNED = "planned "
"""Prefix of a planned value that has the name of a setting, such as `planned lr`."""


def comparison_page(histories: Sequence[History], more: Sequence[Section] = ()) -> Page:
    """Return the page of several runs.

    Args:
        histories: The runs, in the order in which they are shown.
        more: Further sections, shown at the end of the page.
    """
    names = _short_names(histories)
    recipes = ", ".join(dict.fromkeys(history.plan.recipe for history in histories))
    differences = _differences(histories)
    sections = [
        Section(
            title="Differences",
            paragraph="" if differences else "The runs have the same settings.",
            table=Table(head=("", *names), rows=differences) if differences else None,
        ),
        Section(title="Results", table=_results(histories, names)),
        Section(title="Learning", figures=learning_figures(histories, names)),
        Section(title="Learning rate and gradient", figures=_hyperparameters(histories, names)),
        Section(title="Throughput", figures=_throughput(histories, names)),
        *more,
    ]
    return Page(
        title=f"{recipes}: {len(histories)} runs",
        facts=", ".join(names),
        sections=[
            section
            for section in sections
            if section.figures or section.table or section.paragraph or section.text
        ],
    )


def _short_names(histories: Sequence[History]) -> list[str]:
    """Return the shortest ends of the run folders' paths that differ from each other."""
    paths = [history.run_dir.path.parts for history in histories]
    for length in itertools.count(1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(set(paths)) or length > max(map(len, paths)):
            break
    return names


def _differences(histories: Sequence[History]) -> list[list[str]]:
    """Return a row (name, value in each run) for everything set or planned differently.

    A planned value is skipped if its row would repeat an earlier one, such as that of the setting
    that it follows from.
    """
    runs = [_compared_values(history) for history in histories]
    names = dict.fromkeys(itertools.chain.from_iterable(runs))
    rows: list[list[str]] = []
    for name in names:
        cells = [_cell(values.get(name, "")) for values in runs]
        repeats = name.startswith(_PLANNED) and any(row[1:] == cells for row in rows)
        if len(set(cells)) > 1 and not repeats:
            rows.append([name, *cells])
    return rows


def _compared_values(history: History) -> dict[str, Any]:
    """Return settings, the recipe's parameters, planned values, versions and git state by name."""
    plan = history.plan.to_dict()
    record = history.record
    settings = dict(history.plan.settings)
    planned = {f"{_PLANNED}{name}" if name in settings else name: plan[name] for name in _DERIVED}
    parameters = {name: value for name, value in record.overrides.items() if name not in settings}
    code: dict[str, Any] = {"recipe": record.recipe}
    code |= {f"version of {name}": version for name, version in record.versions.items()}
    code |= {"git commit": "", "modified files": ""}
    if record.git is not None:
        code |= {"git commit": record.git.commit, "modified files": record.git.changed_files}
    return settings | parameters | planned | code


def _results(histories: Sequence[History], names: Sequence[str]) -> Table:
    rows: list[list[str]] = []

    def add(name: str, text: Callable[[History], str]) -> None:
        cells = [text(history) for history in histories]
        if any(cells):
            rows.append([name, *cells])

    add("state", lambda history: history.state.name)
    add("steps", lambda history: f"{history.last_step:,} of {history.total_steps:,}")
    add("held-out", lambda h: metrics_text(h.latest_evaluation))
    add(
        "training loss, smoothed",
        lambda h: f"{smoothed(h.steps['loss'])[-1]:.4g}" if h.last_step else "",
    )
    add("run time", lambda h: _optional(h.active_seconds(), duration))
    add("samples/s", lambda h: _optional(h.typical("samples_per_second"), "{:,.0f}".format))
    utilisations = [_utilisation(history) for history in histories]
    for name in dict.fromkeys(name for name, _ in utilisations if name):
        rows.append([name, *(value if name == other else "" for other, value in utilisations)])
    add("peak memory per rank", lambda h: size(max(h.ranks[-1].memory_bytes)) if h.ranks else "")
    add("attempts", lambda h: str(len(h.attempts())) if h.events else "")
    return Table(head=("", *names), rows=rows)


def learning_figures(histories: Sequence[History], names: Sequence[str]) -> list[Figure]:
    """Return the curves of what runs learned: losses, metrics and the gradient noise scale.

    Args:
        histories: The runs.
        names: Their names in the legends.
    """
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
        title = "training loss over samples, smoothed"
        figures.append(Plot(title=title, x_label="samples", y_label="loss", curves=curves))
    timed = [(h, name) for h, name in with_steps if math.isfinite(h.steps["time"][0])]
    if timed:
        curves = [
            Curve(name=name, xs=_seconds_at_steps(h), ys=smoothed(h.steps["loss"]))
            for h, name in timed
        ]
        title = "training loss over run time, smoothed"
        figures.append(Plot(title=title, x_label="seconds", y_label="loss", curves=curves))
    for metric in ["loss", *metric_names(histories)]:
        curves = [
            curve
            for history, name in zip(histories, names, strict=True)
            for curve in evaluation_curves(history, metric, name)
        ]
        if curves:
            figures.append(over_steps(f"held-out {metric}", metric, curves))
    for logged in sorted({name for history in histories for name in history.logged}):
        curves = [
            replace(curve, name=name)
            for history, name in zip(histories, names, strict=True)
            for curve in list(logged_curves(history, logged))[1:]
        ]
        figures.append(over_steps(f"training {logged}, smoothed", logged, curves))
    noisy = [
        Curve(name=name, xs=[s for s, _ in h.noise], ys=[scale for _, scale in h.noise])
        for h, name in with_steps
        if h.noise
    ]
    if noisy:
        figures.append(over_steps("gradient noise scale", "items", noisy, log_y=True))
    return figures


def _seconds_at_steps(history: History) -> list[float]:
    """Return the run time at each step in seconds, without the pauses between attempts."""
    attempts = history.attempts()
    if not attempts:
        start = history.steps["time"][0]
        return [when - start for when in history.steps["time"]]
    seconds = []
    index, seconds_before = 0, 0.0
    for when in history.steps["time"]:
        while index + 1 < len(attempts) and when >= attempts[index + 1].began.time:
            seconds_before += attempts[index].until - attempts[index].began.time
            index += 1
        seconds.append(seconds_before + when - attempts[index].began.time)
    return seconds


def _hyperparameters(histories: Sequence[History], names: Sequence[str]) -> list[Figure]:
    figures: list[Figure] = []
    titles = {"lr": "learning rate", "momentum": "momentum", "grad_norm": "gradient norm"}
    for column, title in titles.items():
        curves = [
            Curve(name=name, xs=history.steps["step"], ys=history.steps[column])
            for history, name in zip(histories, names, strict=True)
            if any(map(math.isfinite, history.steps[column]))
        ]
        if curves:
            figures.append(over_steps(title, column, curves, log_y=column == "grad_norm"))
    return figures


def _throughput(histories: Sequence[History], names: Sequence[str]) -> list[Figure]:
    figures: list[Figure] = []
    rates = [
        Curve(name=name, xs=h.steps["step"], ys=h.steps["samples_per_second"])
        for h, name in zip(histories, names, strict=True)
        if h.last_step
    ]
    if rates:
        figures.append(over_steps("throughput of all ranks together", "samples/s", rates))
    mean_ms: dict[str, list[float]] = {}
    for history in histories:
        for part, values in step_parts(history).items():
            # The first tenth of the steps holds the warm-up.
            finite = [value for value in values[len(values) // 10 :] if math.isfinite(value)]
            mean_ms.setdefault(part, []).append(1e3 * sum(finite) / max(len(finite), 1))
    for part, means in mean_ms.items():
        if len(means) == len(names) and any(means):
            figures.append(_run_bars(f"{part}, mean per step", names, means))
    slowest = [
        max(own_means) if (own_means := mean_own_seconds(h)) else math.nan for h in histories
    ]
    if all(map(math.isfinite, slowest)):
        title = "step time of the slowest rank, excluding waits for other ranks"
        figures.append(_run_bars(title, names, [1e3 * seconds for seconds in slowest]))
    return figures


def _run_bars(title: str, names: Sequence[str], milliseconds: Sequence[float]) -> Bars:
    return Bars(title=title, x_label="run", y_label="ms", names=names, values=milliseconds)


def _utilisation(history: History) -> tuple[str, str]:
    """Return (name, value) of a run's FLOP/s or FLOPs utilisation; empty if unknown."""
    flops = history.flops_per_second()
    return ("", "") if flops is None else utilisation(history, flops)


def _optional(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
