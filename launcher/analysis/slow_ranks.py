"""Ranks that the others wait for, found while a run trains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.planning.plan import Plan

_MIN_RATIO = 1.3
"""A rank is slow if its own time exceeds this many times the median of the others."""

_NUM_ROWS = 5
"""Measurements in a row, each over a second or more, after which a slow rank is named."""


@dataclass(frozen=True, kw_only=True)
class SlowRank:
    """A rank that has been slow for several measurements in a row."""

    rank: int
    ratio: float
    """Its own time per step relative to the median of the others: the median of measurements."""

    since_step: int
    """The step of the first of these measurements."""


class SlowRanks:
    """Finds ranks that are slow for several measurements in a row.

    A rank is named once, and again only after it was as fast as the others for as long.

    Args:
        largest_share: The largest share of a batch relative to the smallest: a rank with more
            samples takes longer without being slow.
    """

    def __init__(self, largest_share: float = 1.0) -> None:
        self._min_ratio = _MIN_RATIO * largest_share
        self._slow: dict[int, list[tuple[int, float]]] = {}
        """The steps and ratios of the last measurements in which a rank was slow."""

        self._num_fast: dict[int, int] = {}
        """Measurements in a row in which a rank that has been named was fast."""

    def add(self, step: int, rank_seconds: Sequence[float]) -> list[SlowRank]:
        """Take one measurement; return the ranks that it shows to be slow.

        Args:
            step: The last step of the measurement.
            rank_seconds: Seconds per step of each rank's own work.
        """
        found = []
        for rank, seconds in enumerate(rank_seconds):
            ratio = _ratio(rank_seconds, rank, seconds)
            if ratio <= self._min_ratio:
                self._slow.pop(rank, None)
                if rank in self._num_fast:
                    self._num_fast[rank] += 1
                    if self._num_fast[rank] == _NUM_ROWS:
                        del self._num_fast[rank]
                continue
            rows = self._slow.setdefault(rank, [])
            rows.append((step, ratio))
            if rank in self._num_fast:
                self._num_fast[rank] = 0
            elif len(rows) == _NUM_ROWS:
                self._num_fast[rank] = 0
                median = statistics.median(ratio for _, ratio in rows)
                found.append(SlowRank(rank=rank, ratio=median, since_step=rows[0][0]))
            del rows[:-_NUM_ROWS]
        return found


def _ratio(rank_seconds: Sequence[float], rank: int, seconds: float) -> float:
    """Return the time of a rank relative to the median of the others; 0 without others."""
    others = [*rank_seconds[:rank], *rank_seconds[rank + 1 :]]
    median = statistics.median(others) if others else 0.0
    return seconds / median if median > 0 else 0.0


def largest_share(plan: Plan) -> float:
    """Return the largest share of a batch that a rank of a plan takes, relative to the smallest."""
    ranks = plan.data_ranks
    parts = [plan.virtual_ranks or stage.batch_size for stage in plan.stages]
    return max((-(-number // ranks) / max(number // ranks, 1e-9) for number in parts), default=1.0)


def slow_rank_text(slow: SlowRank, node: str | None) -> str:
    """Return the warning about a slow rank.

    Args:
        slow: The rank.
        node: The name of its node; None if it is unknown.
    """
    ratio = f"{slow.ratio:.1f}" if math.isfinite(slow.ratio) else "many"
    where = "" if node is None else f" on {node}"
    return (
        f"rank {slow.rank}{where} has taken {ratio} times as long as the others for its own part "
        f"of each step since step {slow.since_step:,}, and they wait for it. `launcher doctor` "
        "examines its node; `launcher report` shows the time of every rank."
    )
