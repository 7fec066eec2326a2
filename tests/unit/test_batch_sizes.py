"""The search for the largest micro-batch that fits, with simulated memory limits."""

from __future__ import annotations

import pytest

from launcher.analysis.batch_sizes import SizeTrial, choose_size, next_size
from launcher.planning.global_batch import ceil_div


def search(share: int, limit: int) -> list[SizeTrial]:
    """Return the trials of a search in which sizes up to `limit` fit."""
    trials: list[SizeTrial] = []
    while (size := next_size(trials, share)) is not None:
        assert size not in [trial.size for trial in trials], "no size is tried twice"
        assert size == ceil_div(share, ceil_div(share, size)), "a plan can use every tried size"
        trials.append(SizeTrial(size=size, fits=size <= limit))
    return trials


@pytest.mark.parametrize("share", [1, 2, 3, 7, 64, 100, 1000, 4097])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.5, 0.77, 0.99, 1.0])
def test_the_largest_size_that_fits_is_found(share: int, fraction: float) -> None:
    """The search finds the largest size to an eighth, in a number of trials that is logarithmic."""
    limit = int(share * fraction)
    trials = search(share, limit)
    largest = max((trial.size for trial in trials if trial.fits), default=0)
    usable_sizes = {ceil_div(share, number) for number in range(1, share + 1)}
    optimum = max((size for size in usable_sizes if size <= limit), default=0)
    assert largest <= optimum <= largest + max(1, largest // 8)
    assert len(trials) <= 2 * share.bit_length() + 4


def test_the_search_ends_when_one_sample_does_not_fit() -> None:
    """If not one sample fits, the search ends at size 1 and chooses nothing."""
    assert [trial.size for trial in search(64, 0)] == [8, 2, 1]
    assert choose_size(search(64, 0)) is None


def test_the_smallest_of_the_fast_sizes_is_chosen() -> None:
    """A larger size that is hardly faster is not chosen, because it takes more memory."""
    rates = {1: 10.0, 2: 50.0, 4: 99.0, 8: 100.0, 16: 98.0}
    trials = [
        SizeTrial(size=size, fits=True, samples_per_second=rate) for size, rate in rates.items()
    ]
    chosen = choose_size([*trials, SizeTrial(size=32, fits=False)])
    assert chosen is not None
    assert chosen.size == 4
