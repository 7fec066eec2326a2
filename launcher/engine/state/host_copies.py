"""Copies of a rank's tensors on the host, from which a checkpoint is written.

Copies from a GPU go to pinned memory, which takes long to allocate. It is kept for the next
checkpoint, and is given back to the system at the end of the run.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launcher.engine.state.fragments import Fragment


class HostMemory:
    """The memory of copies, by name. Each piece of it is either free or lent.

    A piece is lent to one reader and returns when that reader is done, so no copy is overwritten
    while it is read. Whoever copies before that gets other memory.

    Args:
        is_kept: Whether returned memory is kept for the next copies, until `free` is called.
    """

    def __init__(self, *, is_kept: bool) -> None:
        self._is_kept = is_kept
        self._free: dict[str, Tensor] = {}

    def lend(self, name: str, tensor: Tensor) -> Tensor:
        """Return an uninitialised host tensor of the shape and dtype of `tensor`.

        It is pinned if `tensor` is on a GPU.
        """
        free = self._free.pop(name, None)
        if free is not None and (free.shape, free.dtype) == (tensor.shape, tensor.dtype):
            return free
        is_pinned = tensor.device.type != "cpu"
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)

    def give_back(self, lent: dict[str, Tensor]) -> None:
        """Take back all tensors that were lent for a set of copies; no one reads them any more."""
        if self._is_kept:
            self._free = lent

    def free(self) -> None:
        """Free the memory that is not lent, now, and the rest when it is given back."""
        self._is_kept = False
        is_pinned = any(tensor.is_pinned() for tensor in self._free.values())
        self._free = {}
        if is_pinned:
            torch.accelerator.empty_host_cache()  # where torch keeps pinned memory that is freed

    @property
    def num_bytes(self) -> int:
        """The number of bytes that are kept and not lent."""
        return sum(tensor.nbytes for tensor in self._free.values())


class _Division:
    """A division of tensors among owners that writes about as many bytes for each of them."""

    def __init__(self, number: int) -> None:
        self._loads = [(0, owner) for owner in range(number)]

    def next_owner(self, num_bytes: int) -> int:
        """Return the owner of a tensor of this size: the one with the fewest bytes so far."""
        load, owner = heapq.heappop(self._loads)
        heapq.heappush(self._loads, (load + num_bytes, owner))
        return owner


def _copies(tensor: DTensor, world_size: int) -> tuple[int, int]:
    """Return how many ranks hold the same shard of a tensor as this one, and its index among them.

    They differ in their coordinates along the dimensions of the mesh that replicate the tensor. A
    tensor that no tensor-parallel group splits has a mesh without that dimension; the first ranks
    of these meshes are those of the first group.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    number, own = world_size // mesh.size(), int(mesh.mesh.min())
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            number *= mesh.size(dimension)
            own = own * mesh.size(dimension) + coordinate[dimension]
    return number, own


class HostCopies:
    """Copies of the tensors that one rank saves.

    A rank saves its own shards. Full tensors, which every rank has, are divided among the ranks so
    that each rank writes about as many bytes, and shards of which several ranks hold the same one
    are divided among those. Every rank computes the same division.

    Args:
        tensors: Names and tensors, the full ones in the same order on every rank.
        rank: This rank.
        world_size: The number of ranks.
        memory: Lends the memory of the copies.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, Tensor | Fragment]],
        rank: int,
        world_size: int,
        memory: HostMemory,
    ) -> None:
        self._memory = memory
        self._lent: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor | Fragment] = {}
        """The copies by name."""
        full = _Division(world_size)
        shards: dict[int, _Division] = {}
        devices = set()
        for name, tensor in tensors:
            if isinstance(tensor, DTensor):
                number, own = _copies(tensor, world_size)
                division = shards.setdefault(number, _Division(number))
                if division.next_owner(tensor.numel() * tensor.element_size()) != own:
                    continue
            elif (
                isinstance(tensor, Tensor)
                and full.next_owner(tensor.numel() * tensor.element_size()) != rank
            ):
                continue
            self.tensors[name] = self._copy(name, tensor)
            values = tensor.values if isinstance(tensor, Fragment) else tensor
            devices.add(values.device)
        for device in devices:
            torch.get_device_module(device).synchronize(device)

    def release(self) -> None:
        """Give the memory of the copies back. They must not be read afterwards."""
        self.tensors = {}
        self._memory.give_back(self._lent)
        self._lent = {}

    def _copy(self, name: str, tensor: Tensor | Fragment) -> Tensor | Fragment:
        """Return a copy on the host; copies from a GPU are asynchronous."""
        if isinstance(tensor, Fragment):
            return replace(tensor, values=self._copy_plain(name, tensor.values))
        if isinstance(tensor, DTensor):
            local = self._copy_plain(name, tensor.to_local())
            return DTensor(local, tensor._spec, requires_grad=False)  # noqa: SLF001
        return self._copy_plain(name, tensor)

    def _copy_plain(self, name: str, tensor: Tensor) -> Tensor:
        copy = self._lent[name] = self._memory.lend(name, tensor)
        return copy.copy_(tensor.detach(), non_blocking=True)
