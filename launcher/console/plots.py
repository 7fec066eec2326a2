"""Curves, drawn in the terminal by plotille and as images by matplotlib; figures.py has pages."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.errors import RunDirError, UsageError
from launcher.planning.plan import Plan
from launcher.planning.stages import stage_at
from launcher.recipe.schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 76, 16
"""Characters of the area that is drawn in."""

_MOST_POINTS = 400
_INCHES = (7.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points with a line through them."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: Literal["solid", "dashed", "faint", "points", "stacked"] = "solid"
    """On a page; stacked ones stand on each other."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point that matters."""

    name: str
    symbol: str
    """One character that stands for it in a terminal."""

    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Curves over one axis."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    marks: Sequence[Mark] = ()
    log_x: bool = False
    log_y: bool = False


def draw(plot: Plot) -> str:
    """Return the plot in characters, about 90 wide."""
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

    drawn = [place(curve.xs, curve.ys) for curve in plot.curves]
    for curve, points in zip(plot.curves, drawn, strict=True):
        figure.plot(*points, label=curve.name)
    for mark in plot.marks:
        figure.scatter(*place([mark.x], [mark.y]), marker=mark.symbol, label=mark.name)
    _fit(figure, drawn)
    legend = len(plot.curves) + len(plot.marks) > 1
    text: str = figure.show(legend=legend)
    return "\n".join([plot.title, *(line.rstrip() for line in text.splitlines())])


def _fit(figure: Any, drawn: list[tuple[list[float], list[float]]]) -> None:
    """Have the axes span what is drawn, not nothing where all points have one value."""
    for axis, limit in ((0, figure.set_x_limits), (1, figure.set_y_limits)):
        values = [value for points in drawn for value in points[axis]] or [0.0]
        low, high = min(values), max(values)
        room = 0.0 if high > low else max(abs(high), 1.0) / 2
        limit(low - room, high + room)


def _tick(value: float, *, log: bool) -> str:
    if log:
        return f"{10**value:.2g}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def has_images() -> bool:
    """Return whether matplotlib is installed, for images."""
    return importlib.util.find_spec("matplotlib") is not None


def write_png(plot: Plot, path: Path) -> None:
    """Write the plot as an image.

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
            "Images are drawn by matplotlib, which is not installed: "
            "`python -m pip install matplotlib`."
        ) from None
    figure = Figure(figsize=_INCHES, layout="constrained")
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


def schedule_plots(schedule: Schedule, plan: Plan) -> list[Plot]:
    """Return plots of the learning rate, of momentum if it is set, of the batch if it grows."""
    stride = max(plan.total_steps // _MOST_POINTS, 1)
    begins = [stage.first_step for stage in plan.stages[1:]]
    steps = sorted(
        {*range(0, plan.total_steps, stride), plan.lr_peak_step - 1, plan.total_steps - 1}
        | {step + side for step in begins for side in (-1, 0)}
    )
    settings = [plan.setting_at(schedule, step) for step in steps]
    numbers = [step + 1 for step in steps]
    rates = [plan.lr * setting.factor for setting in settings]
    momenta = [setting.momentum for setting in settings if setting.momentum is not None]
    curves = {"lr": rates}
    if len(momenta) == len(settings):
        curves["momentum"] = momenta
    if begins:
        curves["batch"] = [float(stage_at(plan.stages, step).batch_size) for step in steps]
    return [
        Plot(
            title=f"{name} over the steps: {schedule}" if name != "batch" else "global batch size",
            x_label="step",
            y_label=name,
            curves=[Curve(name=name, xs=numbers, ys=values)],
        )
        for name, values in curves.items()
    ]
