"""A gradient norm whose bits do not depend on how the gradient is split.

Floating-point sums depend on the order of their terms, so the norm of sharded gradients would
depend on the number of ranks. Here, squares are rounded to integers of a fixed unit, whose sums are
exact in any order. This is the idea of reproducible summation (Demmel and Nguyen, "Parallel
Reproducible Summation", IEEE Transactions on Computers 2015), with integers in place of bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_PRECISION = {torch.float32: 36, torch.float64: 64}
"""Bits of the sum of squares, relative to the largest one, by the dtype of the result."""

_MAX_LIMB_BITS = 50
_SUM_BITS = 62
"""Bits of a square in one integer, and bits of the sums of such integers, at most."""

_CHUNK = 1 << 16
_CHUNK_ON_GPU = 1 << 24
"""Number of elements that are converted to float64 at once: what a cache holds on a CPU."""

_EXPONENT_BIAS, _MANTISSA_BITS = 1023, 52

Reduce = Callable[[Tensor], Tensor]


def exact_norm(
    grads: Sequence[Tensor], num_elements: int, sum_over_ranks: Reduce, max_over_ranks: Reduce
) -> Tensor:
    """Return the 2-norm of a gradient that may be split over tensors and ranks in any way.

    Args:
        grads: The tensors of this rank, at least one, which are floating-point and on one device.
            They may be empty.
        num_elements: The number of elements over all ranks.
        sum_over_ranks: Returns an int64 tensor summed over ranks.
        max_over_ranks: Returns a float64 tensor of shape () with the maximum over ranks.

    Returns:
        A scalar on the device of the gradients, of dtype float32, or float64 if the gradients are.
        It is infinite or NaN if an element is.
    """
    like = grads[0]
    result_dtype = torch.promote_types(like.dtype, torch.float32)
    filled = [grad for grad in grads if grad.numel()]
    largest = like.new_zeros((), dtype=torch.float64)
    if filled:
        norms = torch._foreach_norm(filled, ord=float("inf"))  # noqa: SLF001
        largest = torch.stack(norms).max().double()
    largest = max_over_ranks(largest)
    count_bits = num_elements.bit_length()
    bits = min(_MAX_LIMB_BITS, _SUM_BITS - count_bits)
    limbs = -(-(_PRECISION[result_dtype] + count_bits) // bits)
    if like.device.type != "cpu":
        return _norm_on_device(filled, largest, limbs, bits, sum_over_ranks).to(result_dtype)
    if not math.isfinite(value := largest.item()):
        return largest.to(result_dtype)
    _, exponent = math.frexp(value)
    sums = sum_over_ranks(_sum_squares(filled, math.ldexp(1.0, -exponent), limbs, bits)).tolist()
    total = sum(limb << bits * (limbs - index - 1) for index, limb in enumerate(sums))
    norm = math.sqrt(total * 2.0 ** -(bits * limbs)) * 2.0**exponent
    return torch.tensor(norm, dtype=torch.float64).to(result_dtype)


def _norm_on_device(
    grads: Sequence[Tensor], largest: Tensor, limbs: int, bits: int, sum_over_ranks: Reduce
) -> Tensor:
    """Return the norm as a float64 scalar, without a wait for the device."""
    is_finite = largest.isfinite()
    exponent = torch.frexp(torch.where(is_finite, largest, 1.0)).exponent.long()
    sums = sum_over_ranks(_sum_squares(grads, _power_of_two(-exponent), limbs, bits, largest))
    total = torch.zeros_like(largest)
    for limb in reversed(sums.unbind()):
        total = (total + limb) * 2.0**-bits
    return torch.where(is_finite, total.sqrt() * _power_of_two(exponent), largest)


def _sum_squares(
    grads: Sequence[Tensor],
    inverse_unit: float | Tensor,
    limbs: int,
    bits: int,
    like: Tensor | None = None,
) -> Tensor:
    """Return the sums of the integers that represent the squares of all elements.

    Args:
        grads: The tensors.
        inverse_unit: A power of two that makes each element smaller than 1.
        limbs: Number of integers for each square.
        bits: Bits of each integer; the first one holds the leading bits.
        like: A tensor on the device of the result; None is the CPU.

    Returns:
        An int64 tensor of shape (limbs,).
    """
    device = None if like is None else like.device
    sums = torch.zeros(limbs, dtype=torch.int64, device=device)
    for chunk in _chunks(grads):
        rest = chunk.double().mul_(inverse_unit).square_()
        for index in range(limbs):
            rest.mul_(2.0**bits)
            whole = rest.long()
            sums[index] += whole.sum()
            if index < limbs - 1:
                rest -= whole
    return sums


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2**exponent as float64, from the bits of the number."""
    biased = (exponent + _EXPONENT_BIAS).clamp(1, 2 * _EXPONENT_BIAS)
    return (biased << _MANTISSA_BITS).view(torch.float64)


def _chunks(grads: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the elements of all tensors in flat tensors of about one chunk."""
    small: list[Tensor] = []
    size = 0
    for grad in grads:
        flat = grad.reshape(-1)
        limit = _CHUNK if flat.device.type == "cpu" else _CHUNK_ON_GPU
        if flat.numel() >= limit:
            yield from flat.split(limit)
            continue
        small.append(flat)
        size += flat.numel()
        if size >= limit:
            yield torch.cat(small)
            small, size = [], 0
    if small:
        yield torch.cat(small)
