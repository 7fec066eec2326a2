"""A plot of curves as an SVG element, for notebooks, and the choice of the points to draw."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

MOST_POINTS = 1000
"""Maximum number of points drawn for one curve; `thinned` chooses them."""

_MAX_POINTS = 300
"""Points of one curve of an SVG element, which is sent again with every update."""

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 24, 40
"""Size of the plot and of its margins in pixels."""

_MAX_TICKS = 6
_COLOURS = ("#4c8dd6", "#e07b39", "#2ca58d", "#c8558f")
"""Colours that can be told apart on a white and on a dark background."""


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


def svg_plot(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str
) -> str:
    """Return curves over common axes as an SVG element, in the text colour of its page.

    Args:
        curves: Positions and values of the points of each curve, by name. Values that are not
            finite leave a gap.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
    """
    thin = {name: thinned(xs, ys, _MAX_POINTS) for name, (xs, ys) in curves.items()}
    points = [
        (x, y) for xs, ys in thin.values() for x, y in zip(xs, ys, strict=True) if math.isfinite(y)
    ]
    x_low, x_high = _limits([x for x, _ in points])
    y_low, y_high = _limits([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = []
    for tick in _ticks(y_low, y_high):
        _, y = place(x_low, tick)
        parts.append(_line((_LEFT, y), (_WIDTH - _RIGHT, y)))
        parts.append(_text(_LEFT - 6, y + 4, _number(tick), "end"))
    for tick in _ticks(x_low, x_high):
        x, _ = place(tick, y_low)
        parts.append(_line((x, _TOP), (x, _HEIGHT - _BOTTOM)))
        parts.append(_text(x, _HEIGHT - _BOTTOM + 16, _number(tick), "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_label, "middle"))
    parts.append(_text(4, 14, y_label, "start"))
    right = float(_WIDTH - _RIGHT)
    for number, (name, (xs, ys)) in enumerate(thin.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        parts += [_curve(stretch, colour) for stretch in _stretches(xs, ys, place)]
        if len(thin) > 1:
            parts.append(_text(right, 14, name, "end", colour))
            right -= 8.0 * len(name) + 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'width="{_WIDTH}" style="max-width:100%" aria-label="{html.escape(y_label)} over '
        f'{html.escape(x_label)}" font-family="sans-serif" font-size="12">{"".join(parts)}</svg>'
    )


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of values, with a margin where all are equal."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.0 if high > low else max(abs(high), 1.0) / 2
    return low - margin, high + margin


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yield round numbers between two limits: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / _MAX_TICKS))
    step = next(power * k for k in (1, 2, 5, 10) if (high - low) / (power * k) <= _MAX_TICKS)
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield number * step


def _stretches(
    xs: Sequence[float], ys: Sequence[float], place: Callable[[float, float], tuple[float, float]]
) -> Iterator[list[tuple[float, float]]]:
    """Yield the parts of a curve between gaps, as positions in pixels."""
    stretch: list[tuple[float, float]] = []
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            stretch.append(place(x, y))
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _curve(points: list[tuple[float, float]], colour: str) -> str:
    if len(points) == 1:
        ((x, y),) = points
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _line(begin: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = begin, end
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" '
        'stroke-opacity="0.15"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = "currentColor") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
        f"{html.escape(text)}</text>"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.3g}"
