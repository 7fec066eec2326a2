"""Ranks that the others wait for, named while a run trains."""

from __future__ import annotations

import pytest
from examples import NODE, recipe

from launcher import make_plan
from launcher.analysis.slow_ranks import SlowRank, SlowRanks, largest_share


def test_a_slow_rank_is_named_once_and_again_after_a_pause() -> None:
    """A rank is named after five slow measurements in a row, and again after five fast ones."""
    watch = SlowRanks()
    slow, fast = [1.0, 1.0, 1.5, 1.1], [1.0, 1.0, 1.0, 1.1]
    named = [watch.add(step, slow) for step in range(10)]
    assert named == [[]] * 4 + [[SlowRank(rank=2, ratio=1.5, since_step=0)]] + [[]] * 5
    assert [watch.add(step, fast) for step in range(10, 15)] == [[]] * 5
    named = [watch.add(step, slow) for step in range(15, 20)]
    assert named[:4] == [[]] * 4
    assert named[4] == [SlowRank(rank=2, ratio=1.5, since_step=15)]


def test_a_rank_that_is_slow_now_and_then_is_not_named() -> None:
    """Four slow measurements in a row are noise; so is a single rank."""
    watch = SlowRanks()
    for step in range(50):
        assert watch.add(step, [1.0, 1.0, 9.0 if step % 5 else 1.0]) == []
        assert SlowRanks().add(step, [1.0]) == []


def test_measurements_without_time_name_no_rank() -> None:
    """Ranks whose own time is zero are not compared."""
    watch = SlowRanks()
    assert [watch.add(step, [0.0, 0.0]) for step in range(9)] == [[]] * 9


@pytest.mark.parametrize(
    ("batch", "ranks", "share"), [(8, 4, 1.0), (9, 4, 1.5), (12, 8, 2.0), (128, 2, 1.0)]
)
def test_larger_shares_are_not_slow(batch: int, ranks: int, share: float) -> None:
    """A rank with more samples than another is compared by the samples that it takes."""
    plan = make_plan(recipe(batch_size=batch), NODE, nproc_per_node=ranks)
    assert largest_share(plan) == share
    watch = SlowRanks(largest_share(plan))
    assert [watch.add(step, [share, 1.0, 1.0]) for step in range(9)] == [[]] * 9
    named = [watch.add(step, [2 * share, 1.0, 1.0]) for step in range(9)]
    assert sum(map(len, named)) == 1
