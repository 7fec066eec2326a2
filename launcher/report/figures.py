"""Figures of HTML pages: plots, bars and timelines as plotly JSON, as text and as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.console.plots import Curve, Plot
from launcher.planning.derivations import counted
from launcher.svg import thinned

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MAX_ROWS = 24
"""Maximum number of rows in the table below a plot, over all curves."""

_MAX_MARKERS = 24
"""A curve of at most so many points is drawn with a marker at each."""

_MAX_TICKS = 8
"""An axis of parallel coordinates with more different values shows the ends alone."""

_TICK_DISTANCE = 0.07
"""Smallest distance of two texts on an axis of parallel coordinates, as a part of it."""

_LOG_SPAN = 20.0
"""Positive numbers that span a larger factor are placed by their logarithms."""

_GREY = "#8a8f98"

_COLOURS = (
    "#4c8dd6",
    "#e07b39",
    "#2ca58d",
    "#c8558f",
    "#8c6bc8",
    "#b3912c",
    "#4fa3b8",
    _GREY,
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


@dataclass(frozen=True, kw_only=True)
class ParallelAxis:
    """One vertical axis of parallel coordinates."""

    name: str
    values: Sequence[float | str]
    """The value of each line. If one of them is text, each different value has a place."""


@dataclass(frozen=True, kw_only=True)
class ParallelCoordinates:
    """One line for each run across several vertical axes: its settings, and at last its result."""

    title: str
    axes: Sequence[ParallelAxis]
    """The axes from left to right; the last one colours the lines."""

    names: Sequence[str]
    """The name of each line."""

    largest_is_best: bool = False
    """Whether the best line has the largest value of the last axis."""


Figure = Plot | Bars | Timeline | ParallelCoordinates


def to_json(figure: Figure) -> str:
    """Return a figure as plotly JSON. The page sets the colours of text, axes and grid."""
    if isinstance(figure, Plot):
        plotly_figure = _plot(figure)
    elif isinstance(figure, Bars):
        plotly_figure = _bars(figure)
    elif isinstance(figure, ParallelCoordinates):
        plotly_figure = _parallel_coordinates(figure)
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


def _parallel_coordinates(coordinates: ParallelCoordinates) -> go.Figure:
    """Return parallel coordinates as lines over axes of 0 to 1, which are drawn as SVG."""
    import plotly.graph_objects as go

    scales = [_Scale(axis.values) for axis in coordinates.axes]
    places = range(len(scales))
    ranks = [scales[-1].place(value) for value in coordinates.axes[-1].values]
    best = max(ranks) if coordinates.largest_is_best else min(ranks)
    traces = [
        go.Scatter(
            x=list(places),
            y=[scales[place].place(coordinates.axes[place].values[number]) for place in places],
            name=name,
            mode="lines+markers",
            line={"color": _COLOURS[0] if ranks[number] == best else _GREY},
            opacity=_opacity(ranks[number], coordinates),
            hovertext=[_line_text(coordinates, number)] * len(scales),
            hoverinfo="text",
        )
        for number, name in enumerate(coordinates.names)
    ]
    figure = go.Figure(traces)
    for place, scale in zip(places, scales, strict=True):
        figure.add_vline(x=place, line={"width": 1, "color": _GREY}, layer="below")
        for position, text in scale.ticks():
            figure.add_annotation(
                x=place, y=position, text=text, showarrow=False, xanchor="left", xshift=6
            )
    figure.update_layout(
        xaxis={
            "tickvals": list(places),
            "ticktext": [axis.name for axis in coordinates.axes],
            "range": [-0.2, len(scales) - 0.5],
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={"visible": False, "range": [-0.08, 1.08]},
        hovermode="closest",
        showlegend=False,
    )
    return figure


class _Scale:
    """Places of values on an axis from 0 to 1.

    Positive numbers that span more than a factor of 20 are placed by their logarithms.

    Args:
        values: The values; text among them gives each different value a place.
    """

    def __init__(self, values: Sequence[float | str]) -> None:
        self._texts: list[str] | None = None
        if any(isinstance(value, str) for value in values):
            self._texts = list(dict.fromkeys(str(value) for value in values))
            self._low, self._high, self._is_log = 0.0, float(len(self._texts) - 1), False
            return
        numbers = [float(value) for value in values]
        self._low, self._high = min(numbers), max(numbers)
        self._is_log = self._low > 0 and self._high / self._low > _LOG_SPAN
        self._numbers = sorted(set(numbers))

    def place(self, value: float | str) -> float:
        """Return the place of a value; the middle if all values are equal."""
        number = float(self._texts.index(str(value))) if self._texts is not None else float(value)
        low, high = self._low, self._high
        if self._is_log:
            number, low, high = math.log(number), math.log(low), math.log(high)
        return 0.5 if high == low else (number - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return places and texts along the axis: of all values if they are few, or of the ends.

        A value too close to one below it, or to the largest, has no text.
        """
        values: Sequence[float | str] = self._texts if self._texts is not None else self._numbers
        if len(values) > _MAX_TICKS:
            values = [values[0], values[-1]]
        ticks = [(self.place(value), _value_text(value)) for value in values]
        chosen = [ticks[-1]]
        for tick in ticks[:-1]:
            if all(abs(tick[0] - other) >= _TICK_DISTANCE for other, _ in chosen):
                chosen.append(tick)
        return chosen


def _opacity(rank: float, coordinates: ParallelCoordinates) -> float:
    """Return the opacity of a line: the better its result, the more visible it is."""
    return 0.25 + 0.75 * (rank if coordinates.largest_is_best else 1 - rank)


def _line_text(coordinates: ParallelCoordinates, number: int) -> str:
    cells = (
        f"{axis.name} {value if isinstance(value, str) else _number(value)}"
        for axis in coordinates.axes
        for value in [axis.values[number]]
    )
    return f"{coordinates.names[number]}: {', '.join(cells)}"


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
    elif isinstance(figure, ParallelCoordinates):
        parts = [_line_text(figure, number) for number in range(len(figure.names))]
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
    if isinstance(figure, ParallelCoordinates):
        rows = [
            [name, *(_value_text(axis.values[number]) for axis in figure.axes)]
            for number, name in enumerate(figure.names)
        ]
        return [["", *(axis.name for axis in figure.axes)], *rows]
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


def _value_text(value: float | str) -> str:
    return value if isinstance(value, str) else _number(value)


def _short(value: float) -> float | None:
    """Return a number rounded to six digits, all that a screen can show; None if not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
