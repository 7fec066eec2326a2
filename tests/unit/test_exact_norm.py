"""The gradient norm whose bits do not depend on how the gradient is sharded by rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from launcher.engine.backends import exact_norm as module
from launcher.engine.backends.exact_norm import _sum_on_device, exact_norm, row_squares

Norm = Callable[[Sequence[Tensor], int, Callable[[Tensor], Tensor], Tensor], Tensor]
"""A norm of (tensors, rows over all ranks, sum over ranks, largest sum of a row)."""

DTYPES = (torch.float32, torch.float64)


def on_host(
    grads: Sequence[Tensor], count: int, add: Callable[[Tensor], Tensor], largest: Tensor
) -> Tensor:
    """Return the norm as a CPU computes it."""
    return exact_norm(grads, count, add, lambda _: largest)


def on_device(
    grads: Sequence[Tensor], count: int, add: Callable[[Tensor], Tensor], largest: Tensor
) -> Tensor:
    """Return the norm as a GPU computes it from the sums of the rows."""
    bits = min(module._MAX_LIMB_BITS, module._SUM_BITS - count.bit_length())
    limbs = -(-(module._PRECISION[grads[0].dtype] + count.bit_length()) // bits)
    squares = torch.cat([row_squares(grad) for grad in grads])
    return _sum_on_device(squares, largest, limbs, bits, add).sqrt().to(grads[0].dtype)


PATHS = {"host": on_host, "device": on_device}


def norm_over_ranks(norm: Norm, ranks: list[list[Tensor]]) -> Tensor:
    """Return the norm that every rank computes from the sums of all ranks.

    Args:
        norm: One of `PATHS`.
        ranks: The tensors of each rank.
    """
    rows = torch.cat([row_squares(grad) for grads in ranks for grad in grads])
    largest, sums = rows.max(), list[Tensor]()

    def collect(values: Tensor) -> Tensor:
        sums.append(values)
        return values

    for grads in ranks:
        norm(grads, len(rows), collect, largest)
    total = torch.stack(sums).sum(0) if sums else torch.zeros(())
    norms = [norm(grads, len(rows), lambda _: total, largest) for grads in ranks]
    for other in norms[1:]:
        assert torch.equal(other.nan_to_num(nan=-1.0), norms[0].nan_to_num(nan=-1.0))
    return norms[0]


def shards(grads: list[Tensor], num_ranks: int) -> list[list[Tensor]]:
    """Return the rows of each tensor in one piece for each rank, some of them empty, as FSDP."""
    pieces = []
    for grad in grads:
        size = -(-len(grad) // num_ranks)
        pieces.append([grad[rank * size : (rank + 1) * size] for rank in range(num_ranks)])
    return [list(of_rank) for of_rank in zip(*pieces, strict=True)]


def gradient(dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Return tensors of one to three dimensions, whose rows differ in size by many powers of two.

    Some rows are zero, and some are so small that their squares are subnormal or zero.
    """
    grads = []
    for _ in range(int(torch.randint(1, 6, (), generator=generator))):
        num_dims = int(torch.randint(1, 4, (), generator=generator))
        shape = torch.randint(1, 14, (num_dims,), generator=generator).tolist()
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        powers = torch.randint(-80, 40, (shape[0], *[1] * (num_dims - 1)), generator=generator)
        grads.append((torch.ldexp(values, powers) * (powers % 7 > 0)).to(dtype))
    return grads


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_bits_do_not_depend_on_the_shards(path: str, dtype: torch.dtype, seed: int) -> None:
    """Rows in any order, over any number of ranks, some without a row, give the same bits."""
    generator = torch.Generator().manual_seed(seed)
    grads = gradient(dtype, generator)
    whole = norm_over_ranks(PATHS[path], [grads])
    for num_ranks in range(2, 9):
        assert torch.equal(norm_over_ranks(PATHS[path], shards(grads, num_ranks)), whole)
    shuffled = [grad[torch.randperm(len(grad), generator=generator)] for grad in reversed(grads)]
    assert torch.equal(norm_over_ranks(PATHS[path], shards(shuffled, 3)), whole)
    numbers = [number for grad in grads for number in grad.double().flatten().tolist()]
    expected = math.sqrt(math.fsum(number * number for number in numbers))
    assert whole.item() == pytest.approx(expected, rel=8 * torch.finfo(dtype).eps, abs=1e-18)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_of_a_row_does_not_depend_on_other_rows(dtype: torch.dtype) -> None:
    """Each row of a gradient has the same sum of squares by itself, and in any shard."""
    generator = torch.Generator().manual_seed(0)
    for width in (1, 2, 3, 7, 8, 9, 16, 31, 33, 64, 127, 500, 4_097, 70_001):
        for num_rows in (2, 3, 5, 8, 17, 33, 64):
            if width * num_rows > 200_000:
                continue
            grad = torch.randn(num_rows, width, generator=generator, dtype=dtype)
            whole = row_squares(grad)
            for step in (1, 2, 3, num_rows // 2 + 1):
                parts = [row_squares(grad[at : at + step]) for at in range(0, num_rows, step)]
                assert torch.equal(torch.cat(parts), whole), (width, num_rows, step)
            images = grad.view(num_rows, 1, 1, width)
            assert torch.equal(row_squares(images), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (3, 1)], ids=str)
def test_gradients_are_not_changed(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The gradient that the norm is taken of keeps its values."""
    grad = torch.full(shape, 3.0, dtype=dtype)
    assert row_squares(grad).sum().item() == pytest.approx(9 * grad.numel())
    assert bool((grad == 3.0).all())


def test_rows_do_not_depend_on_the_memory_format() -> None:
    """A gradient in channels_last has the sums of the same gradient in the usual format."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(6, 5, 3, 3, generator=generator)
    other = grad.contiguous(memory_format=torch.channels_last)
    assert torch.equal(row_squares(other), row_squares(grad))
    assert torch.equal(row_squares(other[2:4]), row_squares(grad)[2:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_device_adds_what_a_host_adds(dtype: torch.dtype) -> None:
    """Both ways of adding the rows give the same norm; in float64 the last bit may differ."""
    for seed in range(200):
        grads = gradient(dtype, torch.Generator().manual_seed(seed))
        host, device = (norm_over_ranks(norm, [grads]).item() for norm in PATHS.values())
        assert math.isclose(host, device, rel_tol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(path: str, dtype: torch.dtype) -> None:
    """Zeros give 0, and an infinity or NaN among other values gives infinity or NaN."""
    norm = PATHS[path]
    assert norm_over_ranks(norm, [[torch.zeros(5, dtype=dtype)]]).item() == 0.0
    assert norm_over_ranks(norm, [[torch.tensor([-0.0], dtype=dtype)]]).item() == 0.0
    assert norm_over_ranks(norm, [[torch.tensor(-3.0, dtype=dtype)]]).item() == 3.0
    one = torch.ones(3, 2, dtype=dtype)
    infinite = torch.tensor([1.0, -torch.inf], dtype=dtype)
    assert norm_over_ranks(norm, [[one], [infinite]]).item() == torch.inf
    unknown = torch.tensor([torch.inf, torch.nan], dtype=dtype)
    assert math.isnan(norm_over_ranks(norm, [[one], [unknown]]).item())


def test_a_rank_without_elements_takes_part() -> None:
    """A rank whose tensors are all empty has the norm of the others."""
    empty = [torch.zeros(0, 4), torch.zeros(0)]
    filled = [torch.full((2, 4), 2.0), torch.full((4,), 1.0)]
    assert norm_over_ranks(on_host, [empty, filled]).item() == 6.0


def test_small_dtypes_have_a_norm_in_float32() -> None:
    """Gradients in bf16 and fp16 have a norm in float32, and those in float64 one in float64."""
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        grads = [torch.full((2, 2), 3.0, dtype=dtype)]
        norm = exact_norm(grads, 2, lambda values: values, lambda values: values)
        assert (norm.dtype, norm.shape) == (expected, ())
        assert norm.item() == pytest.approx(6.0, rel=0.01)


def test_a_nan_on_one_rank_reaches_all() -> None:
    """A NaN on one rank gives every rank a norm that is not finite, and the step is skipped."""
    for own in (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 1.0])):
        # The maximum over ranks is that of gloo: it may drop NaN.
        other = torch.tensor(torch.inf if own.isfinite().all() else 1.0, dtype=torch.float64)
        norm = exact_norm([own], 4, lambda values: values, lambda own: torch.fmax(own, other))  # noqa: B023
        assert not norm.isfinite()


def test_gradients_whose_squares_are_subnormal() -> None:
    """A gradient in float64 of 1e-160 has a norm."""
    grads = [torch.full((3,), 1e-160, dtype=torch.float64)]
    norm = exact_norm(grads, 3, lambda values: values, lambda values: values)
    assert 0 <= norm.item() < 1e-159
