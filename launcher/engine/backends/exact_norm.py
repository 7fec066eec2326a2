"""A gradient norm whose bits do not depend on how the gradient is sharded.

Floating-point sums depend on the order of their terms, so the norm of sharded gradients would
depend on the number of ranks. FSDP shards tensors by rows. Here each row is summed on its own, in
an order that does not depend on the other rows. The sums of the rows are then rounded to integers
of a fixed unit, whose sums are exact in any order. The latter is the idea of reproducible summation
(Demmel and Nguyen, "Parallel Reproducible Summation", IEEE Transactions on Computers 2015), with
integers in place of bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_PRECISION = {torch.float32: 36, torch.float64: 64}
"""Bits of the sum of squares, relative to the largest row, by the dtype of the result."""

_MAX_LIMB_BITS = 50
_SUM_BITS = 62
"""Bits of a value in one integer, and bits of the sums of such integers, at most."""

_EXPONENT_BIAS, _MANTISSA_BITS = 1023, 52
_MIN_EXPONENT = -1000
"""Exponent of the smallest unit, whose inverse is finite."""

Reduce = Callable[[Tensor], Tensor]


def exact_norm(
    grads: Sequence[Tensor], num_rows: int, sum_over_ranks: Reduce, max_over_ranks: Reduce
) -> Tensor:
    """Return the 2-norm of a gradient that may be sharded by rows in any way.

    Args:
        grads: The tensors of this rank, at least one, which are floating-point and on one device.
            They may be empty.
        num_rows: The number of rows of all tensors over all ranks: the size of the first dimension.
        sum_over_ranks: Returns an int64 tensor summed over ranks.
        max_over_ranks: Returns a float64 tensor of shape () with the maximum over ranks.

    Returns:
        A scalar on the device of the gradients, of dtype float32, or float64 if the gradients are.
        It is not finite if an element is not.
    """
    result_dtype = torch.promote_types(grads[0].dtype, torch.float32)
    squares = torch.cat([row_squares(grad) for grad in grads])
    largest = squares.max() if squares.numel() else squares.new_zeros(())
    # A maximum over ranks may drop NaN.
    largest = max_over_ranks(torch.where(largest.isnan(), torch.inf, largest))
    count_bits = num_rows.bit_length()
    bits = min(_MAX_LIMB_BITS, _SUM_BITS - count_bits)
    limbs = -(-(_PRECISION[result_dtype] + count_bits) // bits)
    if squares.device.type != "cpu":
        total = _sum_on_device(squares, largest, limbs, bits, sum_over_ranks)
        return total.sqrt().to(result_dtype)
    if not math.isfinite(value := largest.item()):
        return largest.to(result_dtype)
    exponent = max(math.frexp(value)[1], _MIN_EXPONENT)
    sums = sum_over_ranks(_integers(squares, 2.0**-exponent, limbs, bits)).tolist()
    integer = sum(limb << bits * (limbs - index - 1) for index, limb in enumerate(sums))
    norm = math.sqrt(math.ldexp(integer, exponent - bits * limbs))
    return torch.tensor(norm, dtype=torch.float64).to(result_dtype)


def row_squares(grad: Tensor) -> Tensor:
    """Return the sum of squares of each row, as float64 of shape (rows,).

    The bits of a row's sum do not depend on the other rows. On CPUs torch's norm has this property.
    On GPUs it divides its work by the shape, so the halves of a row are added to each other until
    one element is left.
    """
    if not grad.numel():
        return grad.new_zeros(0, dtype=torch.float64)
    rows = grad.detach().reshape(grad.shape[0] if grad.ndim else 1, -1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if rows.shape[1] <= 1:
        return rows.reshape(-1).double().square()  # double() may return the gradient
    if rows.device.type == "cpu":
        return torch.linalg.vector_norm(rows, dim=1).double().square_()
    squares, width = rows.square(), rows.shape[1]
    while width > 1:
        half = (width + 1) // 2
        squares[:, : width - half] += squares[:, half:width]
        width = half
    return squares[:, 0].double()


def _sum_on_device(
    values: Tensor, largest: Tensor, limbs: int, bits: int, sum_over_ranks: Reduce
) -> Tensor:
    """Return the sum of values over ranks as a float64 scalar, without a wait for the device."""
    is_finite = largest.isfinite()
    exponent = torch.frexp(torch.where(is_finite, largest, 1.0)).exponent.long()
    exponent = exponent.clamp(min=_MIN_EXPONENT)
    sums = sum_over_ranks(_integers(values, _power_of_two(-exponent), limbs, bits))
    total = torch.zeros_like(largest)
    for limb in reversed(sums.unbind()):
        total = (total + limb) * 2.0**-bits
    return torch.where(is_finite, total * _power_of_two(exponent), largest)


def _integers(values: Tensor, inverse_unit: float | Tensor, limbs: int, bits: int) -> Tensor:
    """Return the sums of the integers that represent values, as int64 of shape (limbs,).

    Args:
        values: Numbers that are not negative, of dtype float64.
        inverse_unit: A power of two that makes each value smaller than 1.
        limbs: Number of integers for each value.
        bits: Bits of each integer; the first one holds the leading bits.
    """
    rest, sums = values * inverse_unit, []
    for index in range(limbs):
        rest.mul_(2.0**bits)
        whole = rest.long()
        sums.append(whole.sum())
        if index < limbs - 1:
            rest -= whole
    return torch.stack(sums)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2**exponent as float64, from the bits of the number."""
    return ((exponent + _EXPONENT_BIAS) << _MANTISSA_BITS).view(torch.float64)
