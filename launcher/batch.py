"""The arithmetic of a global batch: who takes which samples of it, in how many micro-steps.

A batch of `size` samples is cut into one contiguous share a rank, each of floor or ceil of
size / world_size samples, and each share into the same number of micro-batches. Ranks with fewer
samples than micro-steps take empty micro-batches, which the engine runs with weight 0, so that
every rank takes part in every collective.
"""

from __future__ import annotations


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
