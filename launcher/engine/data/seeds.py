"""Seeds derived from a path of whole numbers, the same on every machine and Python.

A run has one seed. Everything random in it draws from a seed derived from that one and from
*what* is drawn (the epoch, the sample), never from *where* (the rank, the DataLoader worker),
so that the number of processes cannot change it.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1


def derive(seed: int, *path: int) -> int:
    """Return a 64-bit seed for `path` below `seed`.

    Each element is folded in by one round of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014), whose output function is a bijection: for
    paths of one length, no two that differ in one element alone collide.
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
