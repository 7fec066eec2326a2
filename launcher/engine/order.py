"""The order of samples: a permutation that is computed where it is looked at.

Which sample stands at which position of an epoch is a function of (seed, epoch, position), so every
rank computes the few it needs, in memory of the order of a batch, whatever the size of the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from launcher.seeds import derive

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
        self._keys = [derive(seed, epoch, turn) & _MASK32 for turn in range(_ROUNDS)]

    def __call__(self, positions: Tensor) -> Tensor:
        """Return the elements at `positions` (int64, any shape, each in range(size))."""
        elements = self._pass(positions)
        outside = elements >= self.size
        while bool(outside.any()):
            elements[outside] = self._pass(elements[outside])
            outside = elements >= self.size
        return elements

    def _pass(self, values: Tensor) -> Tensor:
        """Send int64 `values` through the network once; a bijection of range(2**bits)."""
        low_bits, high_bits = self._low, self._high
        low, high = values & ((1 << low_bits) - 1), values >> low_bits
        for key in self._keys:
            # (high | low) -> (low | high ^ mix(low)): the halves change places, and so their widths
            low, high = high ^ (_mix(low ^ key) & ((1 << high_bits) - 1)), low
            low_bits, high_bits = high_bits, low_bits
        return (high << low_bits) | low


def _mix(values: Tensor) -> Tensor:
    """Return the 32-bit finalizer of MurmurHash3 of each value; int64 products may wrap."""
    values = values & _MASK32
    values = ((values ^ (values >> 16)) * 0x85EBCA6B) & _MASK32
    values = ((values ^ (values >> 13)) * 0xC2B2AE35) & _MASK32
    return values ^ (values >> 16)


def elements_at(size: int, seed: int, epoch: int, ranges: list[range]) -> list[list[int]]:
    """Return the elements at each of `ranges` of the epoch's order, computed together.

    Args:
        size: Number of elements in an epoch.
        seed: The run's seed.
        epoch: The epoch, from 0.
        ranges: Positions, contiguous within each range.
    """
    positions = torch.cat([torch.arange(each.start, each.stop) for each in ranges])
    flat = Permutation(size, seed, epoch)(positions).tolist()
    cut, start = [], 0
    for each in ranges:
        cut.append(flat[start : start + len(each)])
        start += len(each)
    return cut
