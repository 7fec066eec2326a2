"""The search for the micro-batch that fits, on memories made up."""

from __future__ import annotations

import pytest

from launcher.analysis.batch_sizes import SizeTrial, choose, next_size
from launcher.planning.global_batch import ceil_div


def search(share: int, most: int) -> list[SizeTrial]:
    """Return the trials of a search where sizes up to `most` fit."""
    trials: list[SizeTrial] = []
    while (size := next_size(trials, share)) is not None:
        assert size not in [trial.size for trial in trials], "nothing is tried twice"
        assert size == ceil_div(share, ceil_div(share, size)), "only what a plan would take"
        trials.append(SizeTrial(size=size, fits=size <= most))
    return trials


@pytest.mark.parametrize("share", [1, 2, 3, 7, 64, 100, 1000, 4097])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.5, 0.77, 0.99, 1.0])
def test_the_largest_that_fits_is_found(share: int, part: float) -> None:
    """To an eighth, in no more trials than a few for each doubling."""
    most = int(share * part)
    trials = search(share, most)
    found = max((trial.size for trial in trials if trial.fits), default=0)
    sizes = {ceil_div(share, number) for number in range(1, share + 1)}
    best = max((size for size in sizes if size <= most), default=0)
    assert found <= best <= found + max(1, found // 8)
    assert len(trials) <= 2 * share.bit_length() + 4


def test_nothing_fits() -> None:
    """It is known when one sample does not."""
    assert [trial.size for trial in search(64, 0)] == [8, 2, 1]
    assert choose(search(64, 0)) is None


def test_the_smallest_of_the_fast_ones_is_taken() -> None:
    """A larger size that is no faster only takes memory."""
    speeds = {1: 10.0, 2: 50.0, 4: 99.0, 8: 100.0, 16: 98.0}
    trials = [SizeTrial(size=size, fits=True, samples_per_second=s) for size, s in speeds.items()]
    chosen = choose([*trials, SizeTrial(size=32, fits=False)])
    assert chosen is not None
    assert chosen.size == 4
