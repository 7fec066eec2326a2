"""The order of samples: a permutation that is computed where it is looked at.

Which sample stands at which position of an epoch is a function of (seed, epoch, position), so every
rank computes the few it needs, in memory of the order of a batch, whatever the size of the data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from launcher.engine.data.seeds import derive

_ROUNDS = 8
_MASK32 = 0xFFFFFFFF


class Permutation:
    """A pseudo-random permutation of range(size), one for each (seed, epoch).

    A Feistel network over the smallest power of two that holds `size`; positions that it sends
    outside are sent through again until they fall inside, which on average takes fewer than two
    passes ("cycle-walking", Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
    2002). Each of its 8 rounds mixes with the finalizer of MurmurHash3. It is a shuffle, not a
    cipher.

    Args:
        size: Number of elements, at least 1.
        seed: The run's seed.
        epoch: The epoch, from 0.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1")
        self.size = size
        bits = max((size - 1).bit_length(), 2)
        self._low, self._high = bits // 2, bits - bits // 2
        self._keys = [np.uint32(derive(seed, epoch, turn) & _MASK32) for turn in range(_ROUNDS)]

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the elements at `positions` (of shape (N,), each in range(size))."""
        elements = self._pass(positions)
        outside = np.flatnonzero(elements >= self.size)
        while len(outside):
            again = self._pass(elements[outside])
            elements[outside] = again
            outside = outside[again >= self.size]
        return elements

    def _pass(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Send `values` through the network once; a bijection of range(2**bits)."""
        low_bits, high_bits = self._low, self._high
        low = (values & ((1 << low_bits) - 1)).astype(np.uint32)
        high = (values >> low_bits).astype(np.uint32)
        for key in self._keys:
            # (high | low) -> (low | high ^ mix(low)): the halves change places, and so their widths
            low, high = high ^ (_mix(low ^ key) & np.uint32((1 << high_bits) - 1)), low
            low_bits, high_bits = high_bits, low_bits
        return (high.astype(np.int64) << low_bits) | low


def _mix(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the finalizer of MurmurHash3 of each value; products wrap. Overwrites `values`."""
    values ^= values >> 16
    values *= 0x85EBCA6B
    values ^= values >> 13
    values *= 0xC2B2AE35
    values ^= values >> 16
    return values


def elements_at(size: int, seed: int, epoch: int, ranges: list[range]) -> list[list[int]]:
    """Return the elements at each of `ranges` of the epoch's order, computed together.

    Args:
        size: Number of elements in an epoch.
        seed: The run's seed.
        epoch: The epoch, from 0.
        ranges: Positions, contiguous within each range.
    """
    positions = np.concatenate([np.arange(each.start, each.stop) for each in ranges])
    flat = Permutation(size, seed, epoch)(positions).tolist()
    cut, start = [], 0
    for each in ranges:
        cut.append(flat[start : start + len(each)])
        start += len(each)
    return cut
