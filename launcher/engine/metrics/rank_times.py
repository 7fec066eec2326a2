"""Each rank's part in the steps: what takes it itself, what it waits for, what memory it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.engine.backends.base import Backend
from launcher.engine.ranks.processes import peak_bytes

_RANKS_PER_SECOND = 64
"""At most as many are written a second, whatever the number of ranks."""

_PASSED = 0.01
"""The part of the time that has passed after which they are written again."""


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """What metrics.jsonl says of each rank's part in the steps since the last such row."""

    own_seconds: list[float] | None
    """Of a step, by rank: without what it waited for communication. The rank that has the most is
    the one that the others wait for. None where that cannot be told."""

    data_wait_seconds: list[float]
    """Of a step, by rank."""

    memory_bytes: list[int]
    """The most that each has held: on a GPU of its memory, otherwise of the host's."""


class CommunicationClock:
    """What a rank waits for communication in a step, from totals over the steps that were timed.

    Args:
        totals: Returns (seconds, steps) so far; None where that cannot be told.
    """

    def __init__(self, totals: Callable[[], tuple[float, int] | None]) -> None:
        self._totals = totals
        self._before = 0.0, 0
        self._latest = 0.0

    def per_step(self) -> float | None:
        """Return the mean over the steps timed since the last call, or what that was before."""
        totals = self._totals()
        if totals is None:
            return None
        seconds, steps = totals[0] - self._before[0], totals[1] - self._before[1]
        if steps > 0:
            self._latest, self._before = max(seconds / steps, 0.0), totals
        return self._latest


class OwnShare:
    """Adds up this rank's part in steps, and says when all ranks tell each other theirs."""

    def __init__(self, world_size: int) -> None:
        self._shortest = max(1.0, world_size / _RANKS_PER_SECOND)
        self._passed, self._due = 0.0, self._shortest
        self._steps, self._own, self._wait = 0, 0.0, 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is time; the same on every rank."""
        return self._passed >= self._due

    def pass_by(self, seconds: float) -> None:
        """Have time go by, as all ranks agree that it has."""
        self._passed += seconds

    def add(self, steps: int, seconds: float, data_wait: float, waited: float | None) -> None:
        """Take steps that took so long together, and waited so long for data.

        For others waited each of them, by the mean.
        """
        self._steps += steps
        self._own += seconds - steps * (waited or 0.0)
        self._wait += data_wait

    def row(self, backend: Backend) -> list[float]:
        """Return this rank's line, and begin anew."""
        steps = max(self._steps, 1)
        row = [max(self._own, 0.0) / steps, self._wait / steps, float(peak_bytes(backend.device))]
        self._steps, self._own, self._wait = 0, 0.0, 0.0
        self._due = self._passed + max(self._shortest, _PASSED * self._passed)
        return row


def by_rank(rows: list[list[float]], *, tells: bool) -> RankRow:
    """Return the lines of all ranks as one; `tells` is whether they know what they waited for."""
    own, waits, memory = zip(*rows, strict=True)
    return RankRow(
        own_seconds=list(own) if tells else None,
        data_wait_seconds=list(waits),
        memory_bytes=[int(each) for each in memory],
    )
