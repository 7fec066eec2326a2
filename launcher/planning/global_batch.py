"""The arithmetic of a global batch: the samples of each rank, in how many micro-steps.

A batch of `size` samples is cut into one contiguous share per rank, of floor or ceil of
size / world_size samples, and each share into the same number of micro-batches. A rank with fewer
samples than micro-steps has empty micro-batches, which the engine runs with weight 0, so that every
rank takes part in every collective.

If the model has BatchNorm, micro-batches of exactly one sample are avoided: the batch is then cut
into fewer micro-batches of at least two samples, and some ranks have none. Each sample has the same
weight in the step either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Statistics = Literal["none", "rank", "all"]
"""The samples that BatchNorm computes statistics over: `none` without BatchNorm, the micro-batch of
a `rank`, or the micro-batches of `all` ranks in a micro-step."""


def ceil_div(numerator: int, denominator: int) -> int:
    """Return numerator / denominator, rounded up."""
    return -(-numerator // denominator)


def part(size: int, parts: int, index: int) -> range:
    """Return the positions of part `index` when `size` positions are cut into `parts`.

    Parts are contiguous and have floor or ceil of size / parts positions, the longer ones first.
    """
    floor, num_longer = divmod(size, parts)
    start = index * floor + min(index, num_longer)
    return range(start, start + floor + (index < num_longer))


def shares(size: int, world_size: int) -> tuple[int, ...]:
    """Return the number of samples that each rank takes of a batch of `size`, by rank."""
    floor, num_longer = divmod(size, world_size)
    return (floor + 1,) * num_longer + (floor,) * (world_size - num_longer)


def num_micro_steps(size: int, world_size: int, micro_batch_size: int) -> int:
    """Return the number of micro-steps for a batch of `size`, which is the same on every rank."""
    return ceil_div(ceil_div(size, world_size), micro_batch_size)


def micro_batch(
    size: int, *, world_size: int, rank: int, micro_steps: int, micro_step: int
) -> range:
    """Return the positions in a batch of `size` that one rank takes in one micro-step."""
    share = part(size, world_size, rank)
    offsets = part(len(share), micro_steps, micro_step)
    return range(share.start + offsets.start, share.start + offsets.stop)


@dataclass(frozen=True, kw_only=True)
class BatchSplit:
    """The division of a run's batches into the micro-batches of its ranks."""

    world_size: int
    """Ranks, or virtual ranks, that share a batch."""

    micro_batch_size: int
    """Maximum number of samples in a micro-batch."""

    statistics: Statistics = "none"
    """The samples that BatchNorm computes statistics over."""

    def micro_steps(self, size: int) -> int:
        """Return the number of micro-steps for a batch of `size`, the same on every rank."""
        if self.avoids_single_samples(size):
            return ceil_div(self._num_paired_parts(size), self.world_size)
        return self._micro_steps(size)

    def positions(self, size: int, rank: int, micro_step: int) -> range:
        """Return the positions in a batch of `size` that one rank takes in one micro-step."""
        if not self.avoids_single_samples(size):
            return micro_batch(
                size,
                world_size=self.world_size,
                rank=rank,
                micro_steps=self._micro_steps(size),
                micro_step=micro_step,
            )
        num_parts = self._num_paired_parts(size)
        parts_of_rank = part(num_parts, self.world_size, rank)
        if micro_step >= len(parts_of_rank):
            return range(0)
        return part(size, num_parts, parts_of_rank.start + micro_step)

    def avoids_single_samples(self, size: int) -> bool:
        """Return whether a batch of `size` is cut unevenly to avoid micro-batches of one sample.

        It is then cut into as many micro-batches of at least two samples as possible, and each rank
        takes floor or ceil of their number per rank.
        """
        num_parts = self._num_paired_parts(size)
        if not num_parts or ceil_div(size, num_parts) > self.micro_batch_size:
            return False
        return self._has_single_sample(size)

    def has_single_sample(self, size: int) -> bool:
        """Return whether a batch of `size` has statistics over one sample, however it is cut."""
        return self._has_single_sample(size) and not self.avoids_single_samples(size)

    def _micro_steps(self, size: int) -> int:
        return num_micro_steps(size, self.world_size, self.micro_batch_size)

    def _num_paired_parts(self, size: int) -> int:
        """Return the number of micro-batches of at least two samples that a batch is cut into."""
        return min(self.world_size * self._micro_steps(size), size // 2)

    def _has_single_sample(self, size: int) -> bool:
        """Return whether statistics would be over a single sample if the shares were even."""
        floor, num_longer = divmod(size, self.world_size)
        micro_steps = self._micro_steps(size)
        if self.statistics == "rank":
            longest = floor + (num_longer > 0)
            return any(0 < share < 2 * micro_steps for share in (floor, longest))
        if self.statistics == "all":
            last = micro_steps - 1
            longer_end, shorter_end = (
                len(part(share, micro_steps, last)) for share in (floor + 1, floor)
            )
            num_shorter = self.world_size - num_longer
            return num_longer * longer_end + num_shorter * shorter_end == 1
        return False
