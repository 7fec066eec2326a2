"""Where ZeRO keeps the elements of each parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class ZeroPlacement:
    """The elements of a parameter on each rank: consecutive ones, in rank order."""

    flat: Tensor
    """This rank's partition of a flat tensor of many parameters, of shape (n,)."""

    position: int
    """The index in `flat` of the first element of the parameter that this rank has."""

    elements: tuple[int, ...]
    """The number of elements on each rank; 0 on ranks without any."""


def placements(
    zero: Any, stage: int, num_ranks: int, rank: int
) -> Iterator[tuple[nn.Parameter, ZeroPlacement]]:
    """Yield each trained parameter, and where its elements are.

    Args:
        zero: DeepSpeed's optimizer.
        stage: The stage of ZeRO, 1 to 3.
        num_ranks: The number of ranks.
        rank: This rank.
    """
    return _in_partitions(zero, num_ranks) if stage == 3 else _in_flat_groups(zero, num_ranks, rank)


def _in_flat_groups(
    zero: Any, num_ranks: int, rank: int
) -> Iterator[tuple[nn.Parameter, ZeroPlacement]]:
    """Yield the parameters in stages 1 and 2, which cut a flat tensor of a whole group."""
    for index, flat in enumerate(zero.single_partition_of_fp32_groups):
        length = zero.partition_size[index]
        parameters = zero.round_robin_bit16_groups[index]
        offsets = zero.round_robin_bit16_offsets[index]
        for parameter, start in zip(parameters, offsets, strict=True):
            stop = start + parameter.numel()
            elements = tuple(
                max(0, min(stop, length * (each + 1)) - max(start, length * each))
                for each in range(num_ranks)
            )
            position = max(start - length * rank, 0) if elements[rank] else 0
            yield parameter, ZeroPlacement(flat=flat, position=position, elements=elements)


def _in_partitions(zero: Any, num_ranks: int) -> Iterator[tuple[nn.Parameter, ZeroPlacement]]:
    """Yield the parameters in stage 3, which cuts each one, and pads its last partitions."""
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        for parameter in group:
            _, position, length = zero.grad_position[zero.get_param_id(parameter)]
            size = torch.Size(parameter.ds_shape).numel()
            elements = tuple(max(0, min(length, size - length * each)) for each in range(num_ranks))
            yield parameter, ZeroPlacement(flat=flat, position=position, elements=elements)
