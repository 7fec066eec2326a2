"""Figures of HTML pages: plots, bars and timelines as plotly JSON, as text and as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.console.plots import Curve, Plot
from launcher.planning.derivations import counted

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_POINTS = 1000
"""Maximum number of points drawn for one curve; `thinned` chooses them."""

_MAX_ROWS = 24
"""Maximum number of rows in the table below a plot, over all curves."""

_MAX_MARKERS = 24
"""A curve of at most so many points is drawn with a marker at each."""

_COLOURS = (
    "#4c8dd6",
    "#e07b39",
    "#2ca58d",
    "#c8558f",
    "#8c6bc8",
    "#b3912c",
    "#4fa3b8",
    "#8a8f98",
)
"""Colours that can be told apart on a white and on a dark background."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar chart with one bar for each name."""

    title: str
    x_label: str
    y_label: str
    names: Sequence[str]
    values: Sequence[float]
    """One value for each name."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A period of time in a timeline."""

    row: str
    """Name of the row that it is drawn in."""

    begin: float
    """Start in seconds since 1970."""

    end: float
    """End in seconds since 1970."""

    description: str
    """What happened in the period and how it ended."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A point in time in a timeline."""

    row: str
    """Name of the row that it is drawn in."""

    time: float
    """Time in seconds since 1970."""

    name: str
    """What happened; the name in the legend."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Periods and points of time over a common time axis, in rows."""

    title: str
    spans: Sequence[Span]
    moments: Sequence[Moment] = ()


Figure = Plot | Bars | Timeline


def to_json(figure: Figure) -> str:
    """Return a figure as plotly JSON. The page sets the colours of text, axes and grid."""
    if isinstance(figure, Plot):
        plotly_figure = _plot(figure)
    elif isinstance(figure, Bars):
        plotly_figure = _bars(figure)
    else:
        plotly_figure = _timeline(figure)
    plotly_figure.update_layout(
        template="none",
        colorway=list(_COLOURS),
        margin={"l": 64, "r": 16, "t": 16, "b": 48},
        height=340,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    text: str = plotly_figure.to_json()
    return text


def _plot(plot: Plot) -> go.Figure:
    import plotly.graph_objects as go

    traces: list[go.Scatter] = []
    is_stacked = any(curve.style == "stacked" for curve in plot.curves)
    for curve in plot.curves:
        xs, ys = thinned(curve.xs, curve.ys, log=plot.log_y)
        has_markers = len(xs) <= _MAX_MARKERS or curve.style == "points"
        traces.append(
            go.Scatter(
                x=list(map(_short, xs)),
                y=list(map(_short, ys)),
                name=curve.name,
                mode="lines+markers" if has_markers else "lines",
                line={"dash": "dash"} if curve.style == "dashed" else {},
                opacity=0.35 if curve.style == "faint" else 1.0,
                stackgroup="all" if curve.style == "stacked" else None,
            )
        )
    traces += [
        go.Scatter(
            x=[mark.x], y=[mark.y], name=mark.name, mode="markers", marker={"size": 11, "symbol": 4}
        )
        for mark in plot.marks
    ]
    figure = go.Figure(traces)
    figure.update_layout(
        xaxis={"title": {"text": plot.x_label}, "type": "log" if plot.log_x else "linear"},
        yaxis={
            "title": {"text": plot.y_label},
            "type": "log" if plot.log_y else "linear",
            "rangemode": "tozero" if is_stacked else "normal",
        },
        hovermode="x unified" if len(plot.curves) > 1 else "closest",
        showlegend=len(traces) > 1,
    )
    return figure


def _bars(bars: Bars) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure(go.Bar(x=list(bars.names), y=list(map(_short, bars.values))))
    figure.update_layout(
        xaxis={"title": {"text": bars.x_label}, "type": "category"},
        yaxis={"title": {"text": bars.y_label}, "rangemode": "tozero"},
        showlegend=False,
    )
    return figure


def _timeline(timeline: Timeline) -> go.Figure:
    import plotly.graph_objects as go

    rows = list(dict.fromkeys(span.row for span in timeline.spans))
    figure = go.Figure(
        [
            go.Bar(
                y=[span.row],
                x=[1e3 * (span.end - span.begin)],
                base=[1e3 * span.begin],
                orientation="h",
                hovertext=[span.description],
                hoverinfo="text",
                name=span.row,
            )
            for span in timeline.spans
        ]
    )
    for name in dict.fromkeys(moment.name for moment in timeline.moments):
        moments = [moment for moment in timeline.moments if moment.name == name]
        figure.add_scatter(
            x=[1e3 * moment.time for moment in moments],
            y=[moment.row for moment in moments],
            mode="markers",
            marker={"size": 10, "line": {"width": 1, "color": "white"}},
            name=name,
        )
    figure.update_layout(
        xaxis={"type": "date"},
        yaxis={"type": "category", "categoryarray": rows[::-1], "categoryorder": "array"},
        barmode="overlay",
        showlegend=bool(timeline.moments),
    )
    return figure


def thinned(
    xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS, *, log: bool = False
) -> tuple[list[float], list[float]]:
    """Return at most about `most` points of a curve, with its extremes among them.

    A curve with more points is divided into equal stretches; the lowest and the highest point of
    each are kept, so that a single spike stays visible. The first and the last point always stay.

    Args:
        xs: Positions of the points.
        ys: Values of the points. A value that is not finite stays and is drawn as a gap.
        most: Number of points to aim for.
        log: Whether the y axis is logarithmic; points that are not positive and finite are dropped.

    Returns:
        The positions and the values of the points that are kept.
    """
    indices = [i for i, y in enumerate(ys) if not log or (math.isfinite(y) and y > 0)]
    if len(indices) > most:
        length = 2 * len(indices) / most
        stretches = (
            indices[round(number * length) : round((number + 1) * length)]
            for number in range(most // 2)
        )
        extremes = {indices[0], indices[-1]}
        for stretch in stretches:
            finite = [i for i in stretch if math.isfinite(ys[i])] or stretch[:1]
            extremes |= {min(finite, key=lambda i: ys[i]), max(finite, key=lambda i: ys[i])}
        indices = sorted(extremes)
    return [xs[i] for i in indices], [ys[i] for i in indices]


def describe(figure: Figure) -> str:
    """Return the content of a figure as text, for readers who cannot see it.

    A curve is described by its first, last, lowest and highest value.
    """
    if isinstance(figure, Plot):
        parts = [_curve_text(curve, figure.x_label) for curve in figure.curves]
        parts += [
            f"{mark.name} at {figure.x_label} {_number(mark.x)}, {_number(mark.y)}"
            for mark in figure.marks
        ]
    elif isinstance(figure, Bars):
        low, high = min(figure.values), max(figure.values)
        lowest = figure.names[list(figure.values).index(low)]
        highest = figure.names[list(figure.values).index(high)]
        label = f"{figure.y_label} of {counted(len(figure.names), figure.x_label)}"
        parts = [f"{label}: from {_number(low)} ({lowest}) to {_number(high)} ({highest})"]
    else:
        parts = [f"{span.row}: {span.description}" for span in figure.spans]
    return f"{figure.title}. " + "; ".join(parts) + "."


def _curve_text(curve: Curve, x_label: str) -> str:
    points = [(x, y) for x, y in zip(curve.xs, curve.ys, strict=True) if math.isfinite(y)]
    if not points:
        return f"{curve.name}: no finite value"
    (first_x, first_y), (last_x, last_y) = points[0], points[-1]
    if len(points) == 1:
        return f"{curve.name}: {_number(first_y)} at {x_label} {_number(first_x)}"
    low_x, low_y = min(points, key=lambda point: point[1])
    high_x, high_y = max(points, key=lambda point: point[1])
    return (
        f"{curve.name}: from {_number(first_y)} at {x_label} {_number(first_x)} to "
        f"{_number(last_y)} at {_number(last_x)}, lowest {_number(low_y)} at {_number(low_x)}, "
        f"highest {_number(high_y)} at {_number(high_x)}"
    )


def as_rows(figure: Figure) -> list[list[str]]:
    """Return the numbers behind a figure as rows of a table, a header first.

    A plot with many points is thinned to about 24 rows over all curves.
    """
    if isinstance(figure, Bars):
        rows = [
            [name, _number(value)] for name, value in zip(figure.names, figure.values, strict=True)
        ]
        return [[figure.x_label, figure.y_label], *rows]
    if isinstance(figure, Timeline):
        return [["", ""], *([span.row, span.description] for span in figure.spans)]
    rows = []
    for curve in figure.curves:
        xs, ys = thinned(curve.xs, curve.ys, _MAX_ROWS // max(len(figure.curves), 1) or 2)
        rows += [[curve.name, _number(x), _number(y)] for x, y in zip(xs, ys, strict=True)]
    rows += [[mark.name, _number(mark.x), _number(mark.y)] for mark in figure.marks]
    return [["", figure.x_label, figure.y_label], *rows]


def _number(value: float) -> str:
    is_whole = float(value).is_integer() and abs(value) < 1e15
    return f"{int(value):,}" if is_whole else f"{value:.4g}"


def _short(value: float) -> float | None:
    """Return a number rounded to six digits, all that a screen can show; None if not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
