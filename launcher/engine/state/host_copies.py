"""Copies of a rank's tensors on the host, from which a checkpoint is written.

They lie in memory that the process which writes them can read. New memory takes several times as
long to fill as memory that has been used before, and pinned memory takes longest. It is therefore
kept for the next checkpoint, and is given back to the system at the end of the run.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launcher.engine.state.fragments import Fragment
from launcher.engine.state.shared_memory import SharedMemory


class LentMemory:
    """The memory of one set of copies.

    Args:
        is_pinned: Whether a GPU copies to it.

    Raises:
        OSError: The kernel gives no such memory.
    """

    def __init__(self, *, is_pinned: bool) -> None:
        self.shared = SharedMemory(is_pinned=is_pinned)
        self.tensors: dict[str, Tensor] = {}
        """The copies by name."""

        self.fits = True
        """Whether every tensor has had its memory since the first set of copies."""

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """Return a host tensor of the shape and dtype of another one: that of the last copies."""
        known = self.tensors.get(name)
        if known is not None and (known.shape, known.dtype) == (like.shape, like.dtype):
            return known
        self.fits &= known is None
        try:
            tensor = self.shared.allocate(like.shape, like.dtype)
        except OSError:  # a limit of file sizes (setrlimit(2)); the checkpoint will not fit either
            tensor, self.fits = torch.empty(like.shape, dtype=like.dtype), False
        self.tensors[name] = tensor
        return tensor

    def free(self) -> None:
        """Give the memory back to the system."""
        self.tensors.clear()
        self.shared.close()


class HostMemory:
    """Lends memory for sets of copies, each to one reader until that reader is done.

    No copy is thus overwritten while it is read. Whoever copies before that gets other memory.

    Args:
        is_pinned: Whether a GPU copies to it.
    """

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned, self._is_kept = is_pinned, True
        self._free: LentMemory | None = None

    def lend(self) -> LentMemory:
        """Return the memory that was given back last, or new memory.

        Raises:
            OSError: The kernel gives no such memory.
        """
        lent, self._free = self._free, None
        return lent or LentMemory(is_pinned=self._is_pinned)

    def give_back(self, lent: LentMemory) -> None:
        """Take back memory that no one reads any more, and keep it for the next copies.

        Memory in which the tensors have changed their shapes is freed instead.
        """
        if self._is_kept and lent.fits and self._free is None:
            self._free = lent
        else:
            lent.free()

    def free(self) -> None:
        """Free the memory that is not lent, now, and the rest when it is given back."""
        self._is_kept = False
        if self._free is not None:
            self._free.free()
        self._free = None

    @property
    def num_bytes(self) -> int:
        """The number of bytes that are kept and not lent."""
        return sum(each.nbytes for each in self._free.tensors.values()) if self._free else 0


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
        self._memory, self._lent = memory, memory.lend()
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

    @property
    def memory(self) -> SharedMemory:
        """The memory in which the copies lie."""
        return self._lent.shared

    def release(self) -> None:
        """Give the memory of the copies back. They must not be read afterwards."""
        self.tensors = {}
        self._memory.give_back(self._lent)

    def _copy(self, name: str, tensor: Tensor | Fragment) -> Tensor | Fragment:
        """Return a copy on the host; copies from a GPU are asynchronous."""
        if isinstance(tensor, Fragment):
            return replace(tensor, values=self._copy_plain(name, tensor.values))
        if isinstance(tensor, DTensor):
            local = self._copy_plain(name, tensor.to_local())
            return DTensor(local, tensor._spec, requires_grad=False)  # noqa: SLF001
        return self._copy_plain(name, tensor)

    def _copy_plain(self, name: str, tensor: Tensor) -> Tensor:
        copy = self._lent.tensor(name, tensor)
        return copy.copy_(tensor.detach(), non_blocking=True)
