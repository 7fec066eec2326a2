"""Seeds derived from a path of integers, equal on every machine and Python version.

A run has one seed. The seeds of data order and augmentation are derived from it and from *what* is
drawn (the epoch, the sample), never from *where* it is drawn (the rank, the DataLoader worker), so
the number of processes does not change them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


def derive(seed: int, *path: int) -> int:
    """Return a 64-bit seed derived from `seed` and the integers in `path`.

    Each element is mixed in by one round of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014), whose output function is a bijection. Two paths
    of the same length that differ in exactly one element therefore have different seeds.
    """
    state = seed & _MASK
    for element in path:
        state = _mix((state ^ (element & _MASK)) & _MASK)
    return state


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the values after a round of SplitMix64, a bijection, each by itself."""
    state = values + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
