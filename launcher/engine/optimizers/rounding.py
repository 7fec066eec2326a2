"""Stochastic rounding to bfloat16 whose random bits belong to elements, not to ranks.

bfloat16 has 8 significant bits. Adam's second moment with beta2=0.999 changes by a thousandth in a
step, which rounding to the nearest value drops every time. Stochastic rounding goes up or down with
probabilities that keep the expected value, so small changes add up as they should.

The random bits are a hash of (seed, step, position of the element among all weights). They are
therefore the same however the weights are sharded, and a resumed run continues with those of its
steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
"""Factors of the hash, as signed 32-bit numbers (Chris Wellons, "lowbias32")."""

_KEEP = -0x10000
"""Mask of the bits of a float32 that a bfloat16 has."""


def mix(bits: Tensor) -> Tensor:
    """Replace 32-bit integers by their hash, in place, and return them.

    Products wrap around at 32 bits. A shift of a negative number extends its sign, so the upper
    bits are cleared.
    """
    bits ^= (bits >> 16) & 0xFFFF
    bits *= _FIRST
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _SECOND
    bits ^= (bits >> 16) & 0xFFFF
    return bits


def random_bits(positions: Tensor, seed: int, step: Tensor) -> Tensor:
    """Return 32 random bits for each position, which it overwrites.

    Args:
        positions: The positions of elements, as int32.
        seed: The seed of the run.
        step: The number of the step, a scalar on the device.
    """
    key = mix(step.to(torch.int32) * _FIRST + signed(seed * 0x9E3779B9 + 0x5BD1E995))
    return mix(mix(positions).bitwise_xor_(key))


def round_to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Return float32 values rounded to bfloat16, up or down by random bits.

    Args:
        values: Finite values.
        bits: Uniform integers from 0 to 65,535, of the same shape, as int32.
    """
    return (values.view(torch.int32) + bits).bitwise_and_(_KEEP).view(torch.float32).bfloat16()


def signed(number: int) -> int:
    """Return the low 32 bits of a number as a signed one."""
    return (number + 2**31) % 2**32 - 2**31


class ElementPositions:
    """Positions of the elements that this rank holds of a weight, among those of all weights.

    Args:
        weight: The weight, which may be a DTensor.
        first: The position of the first element of the full weight.
    """

    def __init__(self, weight: Tensor, first: int) -> None:
        self._first = first
        self._shape: Sequence[int] = weight.shape
        self._offset: Sequence[int] = (0,) * weight.ndim
        if isinstance(weight, DTensor):
            self._shape, self._offset = compute_local_shape_and_global_offset(
                weight.shape, weight.device_mesh, weight.placements
            )
        self._strides = [math.prod(weight.shape[dim + 1 :]) for dim in range(weight.ndim)]
        self._has_whole_rows = tuple(self._shape[1:]) == tuple(weight.shape[1:])

    def of(self, start: int, length: int, device: torch.device) -> Tensor:
        """Return the positions, modulo 2**32, of consecutive elements of the flattened shard.

        Args:
            start: Index of the first of them.
            length: Number of elements.
            device: The device of the result.

        Returns:
            The positions as int32, of shape (length,).
        """
        if self._has_whole_rows:
            before = self._first + start
            if self._offset:
                before += self._offset[0] * self._strides[0]
            return torch.arange(length, dtype=torch.int32, device=device) + signed(before)
        index = torch.arange(start, start + length, device=device)
        positions = torch.full_like(index, self._first)
        for size, offset, stride in zip(
            reversed(self._shape), reversed(self._offset), reversed(self._strides), strict=True
        ):
            positions += (index % size + offset) * stride
            index = index.div_(size, rounding_mode="floor")
        return positions.to(torch.int32)
