"""BatchNorm and micro-batches of one sample, which are avoided, or refused before step 1."""

from __future__ import annotations

import itertools

from launcher.planning.global_batch import BatchSplit


def test_micro_batches_of_one_sample_are_avoided() -> None:
    """Each sample of a batch is taken once, within the limit, and if possible in no single one.

    In each micro-step the ranks without samples are the last ones.
    """
    num_paired = 0
    for size, world_size, limit in itertools.product(range(1, 33), range(1, 6), range(1, 6)):
        split = BatchSplit(world_size=world_size, micro_batch_size=limit, statistics="rank")
        micro_batches = [
            [split.positions(size, rank, step) for step in range(split.micro_steps(size))]
            for rank in range(world_size)
        ]
        flat = [micro_batch for of_rank in micro_batches for micro_batch in of_rank]
        assert list(itertools.chain.from_iterable(flat)) == list(range(size))
        sizes = list(map(len, flat))
        assert max(sizes) <= limit
        assert all(map(any, zip(*micro_batches, strict=True))), "no micro-step is empty"
        for step in zip(*micro_batches, strict=True):
            assert sorted(map(bool, step), reverse=True) == list(map(bool, step))
        assert (1 in sizes) == split.has_single_sample(size)
        if split.has_single_sample(size):
            assert size == 1 or limit == 1 or (limit == 2 and size % 2)
        num_paired += split.avoids_single_samples(size)
    assert num_paired > 50


def test_synchronised_statistics_are_over_two_samples() -> None:
    """A micro-step has a single sample over all ranks only if that cannot be avoided."""
    for size, world_size, limit in itertools.product(range(1, 33), range(1, 6), range(1, 6)):
        split = BatchSplit(world_size=world_size, micro_batch_size=limit, statistics="all")
        counts = [
            sum(len(split.positions(size, rank, step)) for rank in range(world_size))
            for step in range(split.micro_steps(size))
        ]
        assert sum(counts) == size
        assert 0 not in counts
        assert (1 in counts) == split.has_single_sample(size)
