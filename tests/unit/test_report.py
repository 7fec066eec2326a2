"""`launcher report`: pages of real runs, checked in a real browser."""

from __future__ import annotations

import math

from launcher.analysis.time_shares import smoothed, stragglers
from launcher.svg import MOST_POINTS, thinned


def test_many_points_are_thinned_to_their_extremes() -> None:
    """Thinning keeps a spike, both ends and gaps, and drops zeros on a logarithmic axis."""
    xs: list[float] = list(range(100_000))
    ys = [math.sin(x / 1000) for x in xs]
    ys[54_321] = 50.0
    thin_xs, thin_ys = thinned(xs, ys)
    assert len(thin_xs) <= MOST_POINTS + 2
    assert (thin_xs[0], thin_xs[-1]) == (0, 99_999)
    assert max(thin_ys) == 50.0
    assert thinned([1, 2, 3], [1.0, 0.0, 2.0], log=True) == ([1, 3], [1.0, 2.0])
    _, with_gap = thinned([1, 2, 3], [1.0, math.nan, 2.0])
    assert math.isnan(with_gap[1])


def test_smoothing_keeps_gaps() -> None:
    """A smoothed curve is NaN where its values are, and continues after them."""
    assert smoothed([2.0, 2.0, math.nan, 2.0])[:2] == [2.0, 2.0]
    assert math.isnan(smoothed([2.0, math.nan])[1])
    assert smoothed([math.nan, 3.0])[1] == 3.0


def test_stragglers_exceed_the_median_of_the_others() -> None:
    """A straggler is listed with its time relative to the median of the other ranks."""
    assert stragglers([1.0, 3.0]) == [(1, 3.0)]
    assert stragglers([1.0, 1.0, 1.1, 1.0]) == []
    assert stragglers([1.0, 2.0, 1.0, 4.0]) == [(3, 4.0), (1, 2.0)]
    assert stragglers([1.0]) == []
