"""Tensors that are spread over ranks: gathered, and their norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

TENSOR_PARALLEL = "tp"
"""The name of the mesh dimension over which tensor parallelism splits weights."""


def gather_full(tensor: DTensor) -> Tensor:
    """Return the full tensor on every rank (collective).

    FSDP cuts the part that a rank of a tensor-parallel group has, so that part is gathered first.
    """
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or ()
    if TENSOR_PARALLEL not in names or len(names) == 1:
        return tensor.full_tensor()
    *placements, split = tensor.placements
    size = list(tensor.shape)
    if isinstance(split, Shard):
        size[split.dim] //= mesh[TENSOR_PARALLEL].size()
    part = DTensor.from_local(
        tensor.to_local(),
        mesh[tuple(name for name in names if name != TENSOR_PARALLEL)],
        [_plain(placement) for placement in placements],
        run_check=False,
        shape=torch.Size(size),
        stride=_strides(size),
    ).full_tensor()
    return DTensor.from_local(part, mesh[TENSOR_PARALLEL], [split], run_check=False).full_tensor()


def _plain(placement: Any) -> Any:
    """Return a placement without the mark that another mesh dimension was split first."""
    return Replicate() if placement.is_replicate() else Shard(placement.dim)


def _strides(size: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(size[index + 1 :]) for index in range(len(size)))


def norm_over_ranks(
    tensors: Sequence[Tensor], sum_over_ranks: Callable[[Tensor], Tensor], num_ranks: int
) -> Tensor:
    """Return the 2-norm of tensors that are spread over ranks, each in its own way (collective).

    A part that several ranks hold counts once.

    Args:
        tensors: DTensors.
        sum_over_ranks: Sums a tensor over all ranks.
        num_ranks: Number of ranks.
    """
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    norms = torch.stack(torch._foreach_norm(local)).double()  # noqa: SLF001
    holders = [_num_holders(tensor, num_ranks) for tensor in tensors]
    shares = torch.tensor([1 / number for number in holders], dtype=torch.float64)
    total = (norms.square() * shares.to(norms.device, non_blocking=True)).sum()
    return sum_over_ranks(total).sqrt().to(local[0].dtype)


def _num_holders(tensor: Tensor, num_ranks: int) -> int:
    """Return how many ranks hold the part of a tensor that this rank holds."""
    if not isinstance(tensor, DTensor):
        return num_ranks
    mesh = tensor.device_mesh
    parts = math.prod(
        mesh.size(dimension)
        for dimension, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    )
    return num_ranks // parts
