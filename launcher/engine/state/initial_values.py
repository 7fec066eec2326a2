"""Initial values of a model, of which each rank takes its own part.

A model that is larger than a rank's memory is on the meta device when a backend shards it. The
backend then gives memory to the shards of its rank, and has them filled from `InitialValues`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from launcher.engine.state.compiled import plain_name
from launcher.engine.state.fragments import Box, boxes

_CHECKED_VALUES = 1024
"""Number of values of each parameter that are compared between ranks."""


@dataclass(frozen=True, kw_only=True)
class OwnPart:
    """The part of a tensor for which this rank has memory."""

    size: torch.Size
    """The shape of the full tensor."""

    pieces: tuple[tuple[Box, Tensor], ...]
    """Boxes of the full tensor, and the memory of each."""

    @torch.no_grad()
    def take(self, full: Tensor) -> None:
        """Copy this rank's part of the full tensor."""
        for box, memory in self.pieces:
            memory.copy_(full[box.slices])


class InitialValues(Protocol):
    """The initial values of a model's parameters and buffers, by name."""

    @property
    def checksums(self) -> Mapping[str, int]:
        """Return the checksums of the filled parameters, by name, the same on every rank."""

    def fill(self, parts: Mapping[str, OwnPart]) -> None:
        """Fill this rank's parts of all parameters and buffers.

        The names are those of the uncompiled model. It can be called once.
        """


def parts_of(model: nn.Module) -> dict[str, OwnPart]:
    """Return this rank's parts of a model's parameters and buffers, by their plain names.

    A parameter or buffer with several names is under the first one.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    return {
        plain_name(name): shard(tensor) if isinstance(tensor, DTensor) else whole(tensor)
        for name, tensor in named
    }


def whole(tensor: Tensor) -> OwnPart:
    """Return the part of a rank that has the whole tensor."""
    return OwnPart(size=tensor.shape, pieces=((whole_box(tensor.shape), tensor.detach()),))


def whole_box(size: torch.Size) -> Box:
    """Return the box that is a whole tensor."""
    return Box(torch.Size([0] * len(size)), size, 0)


def shard(tensor: DTensor) -> OwnPart:
    """Return the part of a rank that has a shard of a tensor, or a copy of the shard."""
    local = tensor.to_local().detach()
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    if tuple(sizes) != tuple(local.shape):
        raise RuntimeError(f"A shard has shape {tuple(local.shape)} instead of {tuple(sizes)}.")
    pieces = ((Box(torch.Size(offsets), local.shape, 0), local),) if local.numel() else ()
    return OwnPart(size=tensor.shape, pieces=pieces)


def fragment(size: torch.Size, memory: Tensor, start: int) -> OwnPart:
    """Return the part of a rank that has consecutive elements of the flattened tensor.

    Args:
        size: The shape of the full tensor.
        memory: The memory of the elements, of shape (n,), which may reach beyond the tensor's end.
        start: The index of the first element.
    """
    stop = min(start + memory.numel(), size.numel())
    pieces = []
    for box in boxes(size, start, stop):
        first = box.start - start
        pieces.append((box, memory[first : first + box.sizes.numel()].view(box.sizes)))
    return OwnPart(size=size, pieces=tuple(pieces))


def value_checksum(first_values: Tensor, checksum: int = 0) -> int:
    """Return the CRC-32 of the first values of a parameter, after those of other parameters."""
    sample = first_values.detach().flatten()[:_CHECKED_VALUES].double().cpu().contiguous()
    return zlib.crc32(sample.numpy().tobytes(), checksum)


def first_boxes(size: torch.Size) -> list[Box]:
    """Return the boxes of the values that `value_checksum` covers."""
    return list(boxes(size, 0, min(_CHECKED_VALUES, size.numel())))
