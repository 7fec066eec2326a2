"""The arithmetic of a global batch: who takes which samples of it, in how many micro-steps.

A batch of `size` samples is cut into one contiguous share a rank, each of floor or ceil of
size / world_size samples, and each share into the same number of micro-batches. Ranks with fewer
samples than micro-steps take empty micro-batches, which the engine runs with weight 0, so that
every rank takes part in every collective.

Where the model has BatchNorm, micro-batches of exactly one sample are avoided: such a batch is cut
into fewer micro-batches of two samples or more, and some ranks take none. The weights of samples in
a step are the same either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Statistics = Literal["none", "rank", "all"]
"""Over which micro-batches BatchNorm takes statistics: it takes none, over that of a rank, or over
those of all ranks in a micro-step."""


def ceil_div(numerator: int, denominator: int) -> int:
    """Return numerator / denominator, rounded up."""
    return -(-numerator // denominator)


def part(size: int, parts: int, index: int) -> range:
    """Return the positions of part `index` when `size` positions are cut into `parts`.

    Parts are contiguous, of floor or ceil of size / parts positions, the longer ones first.
    """
    floor, longer = divmod(size, parts)
    start = index * floor + min(index, longer)
    return range(start, start + floor + (index < longer))


def shares(size: int, world_size: int) -> tuple[int, ...]:
    """Return the number of samples of each rank in a batch of `size`."""
    floor, longer = divmod(size, world_size)
    return (floor + 1,) * longer + (floor,) * (world_size - longer)


def num_micro_steps(size: int, world_size: int, micro_batch_size: int) -> int:
    """Return the micro-steps that a batch of `size` takes: the same number on every rank."""
    return ceil_div(ceil_div(size, world_size), micro_batch_size)


def micro_batch(
    size: int, *, world_size: int, rank: int, micro_steps: int, micro_step: int
) -> range:
    """Return the positions, within a batch of `size`, of one micro-batch of one rank."""
    share = part(size, world_size, rank)
    within = part(len(share), micro_steps, micro_step)
    return range(share.start + within.start, share.start + within.stop)


@dataclass(frozen=True, kw_only=True)
class BatchSplit:
    """How the batches of a run are cut into the micro-batches of its ranks."""

    world_size: int
    micro_batch_size: int
    """The most samples of a micro-batch."""

    statistics: Statistics = "none"

    def micro_steps(self, size: int) -> int:
        """Return the micro-steps that a batch of `size` takes: the same number on every rank."""
        if self.is_paired(size):
            return ceil_div(self._pairs(size), self.world_size)
        return self._micro_steps(size)

    def positions(self, size: int, rank: int, micro_step: int) -> range:
        """Return the positions, within a batch of `size`, of one micro-batch of one rank."""
        if not self.is_paired(size):
            return micro_batch(
                size,
                world_size=self.world_size,
                rank=rank,
                micro_steps=self._micro_steps(size),
                micro_step=micro_step,
            )
        pairs = self._pairs(size)
        own = part(pairs, self.world_size, rank)
        return part(size, pairs, own.start + micro_step) if micro_step < len(own) else range(0)

    def is_paired(self, size: int) -> bool:
        """Return whether a batch is cut so that no micro-batch has exactly one sample.

        It is then cut into as many micro-batches of two samples or more as there can be, and ranks
        take floor or ceil of their number.
        """
        pairs = self._pairs(size)
        return self._has_one(size) and pairs > 0 and ceil_div(size, pairs) <= self.micro_batch_size

    def is_lone(self, size: int) -> bool:
        """Return whether some statistics are over a single sample, however a batch is cut."""
        return self._has_one(size) and not self.is_paired(size)

    def _micro_steps(self, size: int) -> int:
        return num_micro_steps(size, self.world_size, self.micro_batch_size)

    def _pairs(self, size: int) -> int:
        return min(self.world_size * self._micro_steps(size), size // 2)

    def _has_one(self, size: int) -> bool:
        """Return whether statistics would be over a single sample in even shares."""
        floor, longer = divmod(size, self.world_size)
        steps = self._micro_steps(size)
        if self.statistics == "rank":
            longest = floor + (longer > 0)
            return any(0 < share < 2 * steps for share in (floor, longest))
        if self.statistics == "all":
            last = [len(part(share, steps, steps - 1)) for share in (floor + 1, floor)]
            return longer * last[0] + (self.world_size - longer) * last[1] == 1
        return False
