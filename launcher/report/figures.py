"""Figures for a page, drawn by plotly in the browser, each with the same in words beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.console.plots import Curve, Plot

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_POINTS = 1000
"""Of a curve; of more, the lowest and the highest of each stretch are drawn."""

_MOST_ROWS = 24
"""Of the table under a figure."""

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
"""Told apart on white and on black."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar for each name."""

    title: str
    x_label: str
    y_label: str
    names: Sequence[str]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of time."""

    row: str
    begin: float
    end: float
    words: str
    """What it was, and how it ended."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A point in time."""

    row: str
    time: float
    words: str


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Stretches and points of time, in rows."""

    title: str
    spans: Sequence[Span]
    moments: Sequence[Moment] = ()


Figure = Plot | Bars | Timeline


def to_json(figure: Figure) -> str:
    """Return a figure as plotly's JSON, without colours of its own for text and lines."""
    if isinstance(figure, Plot):
        drawn = _plot(figure)
    elif isinstance(figure, Bars):
        drawn = _bars(figure)
    else:
        drawn = _timeline(figure)
    drawn.update_layout(
        template="none",
        colorway=list(_COLOURS),
        margin={"l": 64, "r": 16, "t": 16, "b": 48},
        height=340,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    text: str = drawn.to_json()
    return text


def _plot(plot: Plot) -> go.Figure:
    import plotly.graph_objects as go

    traces: list[go.Scatter] = []
    stacked = any(curve.style == "stacked" for curve in plot.curves)
    for curve in plot.curves:
        xs, ys = thinned(curve.xs, curve.ys, log=plot.log_y)
        few = len(xs) <= 24 or curve.style == "points"
        traces.append(
            go.Scatter(
                x=list(map(_short, xs)),
                y=list(map(_short, ys)),
                name=curve.name,
                mode="lines+markers" if few else "lines",
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
            "rangemode": "tozero" if stacked else "normal",
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
                hovertext=[span.words],
                hoverinfo="text",
                name=span.row,
            )
            for span in timeline.spans
        ]
    )
    for words in dict.fromkeys(moment.words for moment in timeline.moments):
        those = [moment for moment in timeline.moments if moment.words == words]
        figure.add_scatter(
            x=[1e3 * moment.time for moment in those],
            y=[moment.row for moment in those],
            mode="markers",
            marker={"size": 10, "line": {"width": 1, "color": "white"}},
            name=words,
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
    """Return the points of a curve, of many the lowest and the highest of each stretch.

    Where the axis is logarithmic, those that have no place on it are left out. Others that are not
    finite leave a gap.
    """
    kept = [i for i, y in enumerate(ys) if not log or (math.isfinite(y) and y > 0)]
    if len(kept) > most:
        size = 2 * len(kept) / most
        stretches = (
            kept[round(start * size) : round((start + 1) * size)] for start in range(most // 2)
        )
        chosen = {kept[0], kept[-1]}
        for stretch in stretches:
            known = [i for i in stretch if math.isfinite(ys[i])] or stretch[:1]
            chosen |= {min(known, key=lambda i: ys[i]), max(known, key=lambda i: ys[i])}
        kept = sorted(chosen)
    return [xs[i] for i in kept], [ys[i] for i in kept]


def in_words(figure: Figure) -> str:
    """Return what a figure shows, for who cannot see it."""
    if isinstance(figure, Plot):
        said = [_curve_in_words(curve, figure.x_label) for curve in figure.curves]
        said += [
            f"{mark.name} at {figure.x_label} {_number(mark.x)}, {_number(mark.y)}"
            for mark in figure.marks
        ]
    elif isinstance(figure, Bars):
        low, high = min(figure.values), max(figure.values)
        least = figure.names[list(figure.values).index(low)]
        most = figure.names[list(figure.values).index(high)]
        what = f"{figure.y_label} of {len(figure.names)} {figure.x_label}"
        said = [f"{what}: from {_number(low)} ({least}) to {_number(high)} ({most})"]
    else:
        said = [f"{span.row}: {span.words}" for span in figure.spans]
    return f"{figure.title}. " + "; ".join(said) + "."


def _curve_in_words(curve: Curve, x_label: str) -> str:
    points = [(x, y) for x, y in zip(curve.xs, curve.ys, strict=True) if math.isfinite(y)]
    if not points:
        return f"{curve.name}: no value"
    (first, begins), (last, ends) = points[0], points[-1]
    if len(points) == 1:
        return f"{curve.name}: {_number(begins)} at {x_label} {_number(first)}"
    low = min(points, key=lambda point: point[1])
    high = max(points, key=lambda point: point[1])
    return (
        f"{curve.name}: from {_number(begins)} at {x_label} {_number(first)} to {_number(ends)} at "
        f"{_number(last)}, lowest {_number(low[1])} at {_number(low[0])}, highest "
        f"{_number(high[1])} at {_number(high[0])}"
    )


def as_rows(figure: Figure) -> list[list[str]]:
    """Return a head and some rows of the numbers behind a figure."""
    if isinstance(figure, Bars):
        rows = [
            [name, _number(value)] for name, value in zip(figure.names, figure.values, strict=True)
        ]
        return [[figure.x_label, figure.y_label], *rows]
    if isinstance(figure, Timeline):
        return [["", ""], *([span.row, span.words] for span in figure.spans)]
    rows = []
    for curve in figure.curves:
        xs, ys = thinned(curve.xs, curve.ys, _MOST_ROWS // max(len(figure.curves), 1) or 2)
        rows += [[curve.name, _number(x), _number(y)] for x, y in zip(xs, ys, strict=True)]
    rows += [[mark.name, _number(mark.x), _number(mark.y)] for mark in figure.marks]
    return [["", figure.x_label, figure.y_label], *rows]


def _number(value: float) -> str:
    whole = float(value).is_integer() and abs(value) < 1e15
    return f"{int(value):,}" if whole else f"{value:.4g}"


def _short(value: float) -> float | None:
    """Return a number in six digits, which is what a screen can show; None where there is none."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
