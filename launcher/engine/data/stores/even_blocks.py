"""Even divisions of the samples of a store that has no units of its own."""

from __future__ import annotations

BLOCK = 1024
"""Number of neighbouring samples that count as a unit of the storage."""


def block_sizes(count: int) -> list[int]:
    """Return the sizes of the blocks of `BLOCK` samples that make up `count` samples."""
    full, rest = divmod(count, BLOCK)
    return [BLOCK] * full + [rest] * (rest > 0)


def spaced(count: int, limit: int) -> list[int]:
    """Return at most `limit` evenly spaced numbers below `count`, with the first and the last."""
    if count <= limit:
        return list(range(count))
    return [place * (count - 1) // (limit - 1) for place in range(limit)]
