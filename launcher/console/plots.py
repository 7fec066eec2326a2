"""Plots of curves, drawn in the terminal by plotille and written as PNG files by matplotlib.

`launcher.report.figures` draws the same plots on HTML pages.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.errors import RunDirError, UsageError
from launcher.planning.plan import Plan, PlannedObjective
from launcher.planning.stages import stage_at
from launcher.recipe.schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 76, 16
"""Size of the drawing area in characters."""

_MAX_SCHEDULE_POINTS = 400
_SIZE_INCHES = (7.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve of a plot."""

    name: str
    """Name in the legend."""

    xs: Sequence[float]
    ys: Sequence[float]
    """Values at `xs`, equally many. A value that is not finite leaves a gap."""

    style: Literal["solid", "dashed", "faint", "points", "stacked"] = "solid"
    """Style on an HTML page. Stacked curves are drawn as areas on top of each other."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A highlighted point, such as the suggestion of a finder."""

    name: str
    """Name in the legend."""

    symbol: str
    """The character that marks the point in a terminal."""

    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Curves and marks over one pair of axes."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    marks: Sequence[Mark] = ()
    log_x: bool = False
    log_y: bool = False


def draw(plot: Plot) -> str:
    """Return the plot as text, about 90 characters wide.

    Points that are not finite, or not positive on a logarithmic axis, are skipped.
    """
    import plotille

    figure = plotille.Figure()
    figure.width, figure.height = _WIDTH, _HEIGHT
    figure.with_colors = figure.origin = False
    figure.x_label, figure.y_label = plot.x_label, plot.y_label
    figure.register_label_formatter(float, lambda value, **_: f"{value:.3g}")
    figure.x_ticks_fkt = lambda value, _: _tick(value, log=plot.log_x)
    figure.y_ticks_fkt = lambda value, _: _tick(value, log=plot.log_y)

    def place(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
        points = [
            (math.log10(x) if plot.log_x else x, math.log10(y) if plot.log_y else y)
            for x, y in zip(xs, ys, strict=True)
            if math.isfinite(x) and math.isfinite(y)
            if (x > 0 or not plot.log_x) and (y > 0 or not plot.log_y)
        ]
        return [x for x, _ in points], [y for _, y in points]

    placed_curves = [place(curve.xs, curve.ys) for curve in plot.curves]
    for curve, points in zip(plot.curves, placed_curves, strict=True):
        figure.plot(*points, label=curve.name)
    for mark in plot.marks:
        figure.scatter(*place([mark.x], [mark.y]), marker=mark.symbol, label=mark.name)
    _set_limits(figure, placed_curves)
    legend = len(plot.curves) + len(plot.marks) > 1
    text: str = figure.show(legend=legend)
    return "\n".join([plot.title, *(line.rstrip() for line in text.splitlines())])


def _set_limits(figure: Any, curves: list[tuple[list[float], list[float]]]) -> None:
    """Set axis limits that span the curves, with a margin where all values are equal."""
    for axis, set_limits in ((0, figure.set_x_limits), (1, figure.set_y_limits)):
        values = [value for points in curves for value in points[axis]] or [0.0]
        low, high = min(values), max(values)
        margin = 0.0 if high > low else max(abs(high), 1.0) / 2
        set_limits(low - margin, high + margin)


def _tick(value: float, *, log: bool) -> str:
    if log:
        return f"{10**value:.2g}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def has_images() -> bool:
    """Return whether matplotlib is installed, which `write_png` needs."""
    return importlib.util.find_spec("matplotlib") is not None


def write_png(plot: Plot, path: Path) -> None:
    """Write the plot as a PNG file of 1050 x 600 pixels.

    Raises:
        UsageError: matplotlib is not installed.
        RunDirError: The file cannot be written.
    """
    figure = _figure(plot)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise RunDirError(f"Cannot write {path}: {error.strerror}.") from None


def _figure(plot: Plot) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "PNG files need matplotlib, which is not installed: run "
            "`python -m pip install matplotlib`."
        ) from None
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    for curve in plot.curves:
        axes.plot(curve.xs, curve.ys, label=curve.name)
    for mark in plot.marks:
        axes.plot(mark.x, mark.y, "o", label=mark.name)
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    if plot.log_x:
        axes.set_xscale("log")
    if plot.log_y:
        axes.set_yscale("log")
    if len(plot.curves) + len(plot.marks) > 1:
        axes.legend()
    axes.grid(alpha=0.3)
    return figure


def schedule_plots(
    schedule: Schedule, plan: Plan, objective: PlannedObjective | None = None
) -> list[Plot]:
    """Return the plots of a schedule over the steps of a plan.

    The first plot shows the learning rate. Momentum follows if the schedule sets it, the global
    batch size if it grows. Steps are counted from 1 on the x axis.

    Args:
        schedule: The schedule of the recipe, or of the objective.
        plan: The plan.
        objective: The objective whose schedule it is, if the recipe has several.

    Raises:
        UsageError: Only the run computes the learning rate.
    """
    if not schedule.is_planned:
        raise UsageError(
            f"The learning rate of {schedule} cannot be drawn: only the run computes it. "
            "`launcher report` draws the one of a run."
        )
    peak_lr, whose = plan.lr, ""
    if objective is not None:
        peak_lr, whose = objective.lr, f" of {objective.name}"
    stride = max(plan.total_steps // _MAX_SCHEDULE_POINTS, 1)
    stage_starts = [stage.first_step for stage in plan.stages[1:]]
    if plan.timed_steps is not None and 0 < plan.timed_steps.first_step < plan.total_steps:
        jumps = [*stage_starts, plan.timed_steps.first_step]
    else:
        jumps = stage_starts
    # The peak, the last step and both sides of every jump are always among the points.
    steps = sorted(
        {*range(0, plan.total_steps, stride), (plan.lr_peak_step or 1) - 1, plan.total_steps - 1}
        | {jump + offset for jump in jumps for offset in (-1, 0)}
    )
    settings = [plan.schedule_value_at(schedule, step) for step in steps]
    step_numbers = [step + 1 for step in steps]
    momenta = [setting.momentum for setting in settings if setting.momentum is not None]
    series = {"lr": [peak_lr * setting.factor for setting in settings]}
    if len(momenta) == len(settings):
        series["momentum"] = momenta
    if stage_starts:
        series["batch"] = [float(stage_at(plan.stages, step).batch_size) for step in steps]
    return [
        Plot(
            title=f"{name}{whose} over the steps: {schedule}"
            if name != "batch"
            else "global batch size",
            x_label="step",
            y_label=name,
            curves=[Curve(name=name, xs=step_numbers, ys=values)],
        )
        for name, values in series.items()
    ]
