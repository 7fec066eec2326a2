"""The order of samples in an epoch: a permutation that is never stored as a whole.

The sample at a position is a function of (seed, epoch, position). Every rank computes only the
samples that it needs, so its memory depends on the batch and not on the size of the data set.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from launcher.engine.data.seeds import derive

_ROUNDS = 8
_MASK32 = 0xFFFFFFFF


class Permutation:
    """A pseudo-random permutation of range(size) for one seed and epoch.

    The permutation is a Feistel network over the smallest power of two that is at least `size` (and
    at least 4). Positions that it maps outside range(size) pass through again until they fall
    inside, in fewer than two passes on average ("cycle-walking", Black and Rogaway, "Ciphers with
    arbitrary finite domains", CT-RSA 2002). Each of its 8 rounds mixes with the finalizer of
    MurmurHash3. It is a shuffle, not a cipher.

    Args:
        size: The number of elements, at least 1.
        seed: The run's seed.
        epoch: The epoch, counted from 0.

    Raises:
        ValueError: `size` is less than 1.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1")
        self.size = size
        bits = max((size - 1).bit_length(), 2)
        self._low, self._high = bits // 2, bits - bits // 2
        self._keys = [
            np.uint32(derive(seed, epoch, round_index) & _MASK32) for round_index in range(_ROUNDS)
        ]

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the elements at `positions`.

        Args:
            positions: Positions of shape (N,), each in range(size).

        Returns:
            Elements of shape (N,), each in range(size).
        """
        elements = self._permute(positions)
        outside = np.flatnonzero(elements >= self.size)
        while len(outside):
            permuted = self._permute(elements[outside])
            elements[outside] = permuted
            outside = outside[permuted >= self.size]
        return elements

    def _permute(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Apply the Feistel network once, a bijection of range(2**bits)."""
        low_bits, high_bits = self._low, self._high
        low = (values & ((1 << low_bits) - 1)).astype(np.uint32)
        high = (values >> low_bits).astype(np.uint32)
        for key in self._keys:
            # (high | low) -> (low | high ^ mix(low)): the halves and their widths swap places
            low, high = high ^ (_mix(low ^ key) & np.uint32((1 << high_bits) - 1)), low
            low_bits, high_bits = high_bits, low_bits
        return (high.astype(np.int64) << low_bits) | low


def _mix(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Apply the finalizer of MurmurHash3 to `values` in place and return them; products wrap."""
    values ^= values >> 16
    values *= 0x85EBCA6B
    values ^= values >> 13
    values *= 0xC2B2AE35
    values ^= values >> 16
    return values
