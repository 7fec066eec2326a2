"""Where ZeRO keeps the elements of each parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from launcher.engine.optimizers.matrices import FlatWeight


class _Cut(NamedTuple):
    """A parameter, as ZeRO cuts it into consecutive elements for each rank."""

    parameter: nn.Parameter
    shape: torch.Size
    flat: Tensor
    position: int
    elements: tuple[int, ...]


def flat_weights(
    zero: Any, stage: int, *, num_ranks: int, rank: int, device: torch.device
) -> Iterator[tuple[nn.Parameter, FlatWeight]]:
    """Yield each trained parameter, with its elements on each rank.

    Args:
        zero: DeepSpeed's optimizer.
        stage: The stage of ZeRO, 1 to 3.
        num_ranks: The number of ranks.
        rank: This rank.
        device: This rank's device.
    """
    cuts = _in_partitions(zero, num_ranks) if stage == 3 else _in_groups(zero, num_ranks, rank)
    for cut in cuts:
        weight = FlatWeight(
            cut.flat,
            cut.shape,
            position=cut.position,
            elements=cut.elements,
            rank=rank,
            device=device,
        )
        yield cut.parameter, weight


def _in_groups(zero: Any, num_ranks: int, rank: int) -> Iterator[_Cut]:
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
            yield _Cut(parameter, parameter.shape, flat, position, elements)


def _in_partitions(zero: Any, num_ranks: int) -> Iterator[_Cut]:
    """Yield the parameters in stage 3, which cuts each one, and pads its last partitions."""
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        for parameter in group:
            _, position, length = zero.grad_position[zero.get_param_id(parameter)]
            shape = torch.Size(parameter.ds_shape)
            elements = tuple(
                max(0, min(length, shape.numel() - length * each)) for each in range(num_ranks)
            )
            yield _Cut(parameter, shape, flat, position, elements)
