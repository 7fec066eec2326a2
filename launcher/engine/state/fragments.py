"""The parts of a tensor that ZeRO keeps on one rank, and where they lie in the full tensor.

DeepSpeed cuts tensors without regard to their shape: a rank holds a run of consecutive elements,
which may begin and end within a row. torch.distributed.checkpoint stores boxes, which are aligned
with the dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Consecutive elements of a tensor, in the order of the full tensor's last dimension."""

    values: Tensor
    """The elements, of shape (n,)."""

    start: int
    """The index of the first of them in the flattened full tensor."""

    size: torch.Size
    """The shape of the full tensor."""


class Box(NamedTuple):
    """A box of a tensor: its place and shape, and where its elements lie in a fragment."""

    offsets: torch.Size
    """The index of its first element in each dimension of the full tensor."""

    sizes: torch.Size
    """Its length in each dimension."""

    start: int
    """The index of its first element in the flattened full tensor. Its elements are consecutive."""

    @property
    def slices(self) -> tuple[slice, ...]:
        """Return the index of the box in the full tensor."""
        return tuple(
            slice(offset, offset + size)
            for offset, size in zip(self.offsets, self.sizes, strict=True)
        )


def boxes(size: torch.Size, start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes that cover the elements from `start` to `stop` of a flattened tensor.

    There are at most 2 n - 1 boxes in n dimensions: rows that are covered in part at both ends, and
    the complete rows between them.

    Args:
        size: The shape of the tensor.
        start: Index of the first element.
        stop: Index after the last element, at most the number of elements.
    """
    if start >= stop:
        return
    if not size:
        yield Box(torch.Size(()), torch.Size(()), 0)
        return
    row_size = torch.Size(size[1:])
    row = math.prod(row_size)
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _in_row(row_size, last, start, stop)
        return
    yield from _in_row(row_size, first - 1, start, first * row)
    if first < last:
        offsets = torch.Size((first, *(0 for _ in row_size)))
        yield Box(offsets, torch.Size((last - first, *row_size)), first * row)
    yield from _in_row(row_size, last, last * row, stop)


def _in_row(row_size: torch.Size, index: int, start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes that cover elements of one row of a tensor.

    Args:
        row_size: The shape of a row.
        index: The index of the row.
        start: Index of the first element in the flattened tensor.
        stop: Index after the last element.
    """
    before = index * math.prod(row_size)
    for box in boxes(row_size, start - before, stop - before):
        yield Box(
            torch.Size((index, *box.offsets)), torch.Size((1, *box.sizes)), before + box.start
        )
