"""Whole matrices of sharded or replicated weights, each computed on one rank.

Muon needs a matrix as a whole, and a rank has some of its rows under FSDP, or a run of its elements
under ZeRO. The matrices are taken in rounds of as many as there are ranks, similar sizes together.
In a round each rank receives all elements of one matrix (an all-to-all), computes with it, and
sends the elements of the result back to the ranks that hold them. Where every rank has all matrices
(DDP), the ranks share the work as well, and send each other the results.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from launcher.engine.optimizers.matrices import FlatWeight, Matrix

Function = Callable[[Tensor], Tensor]
"""Takes a matrix of shape (rows, columns), and returns one of the same shape and dtype."""


class Exchange(ABC):
    """How the ranks share the work on whole matrices."""

    size: int = 1
    """The number of matrices in a round."""

    @abstractmethod
    def apply(
        self, function: Function, matrices: Sequence[Matrix], own: list[Tensor]
    ) -> list[Tensor]:
        """Return this rank's elements of the results of `function` (collective).

        Args:
            function: What is computed for each matrix.
            matrices: The matrices of a round, at most `size`.
            own: This rank's elements of each, in the shape of `Matrix.part`. So are the results.
        """


class _Alone(Exchange):
    """Computes every matrix on this rank."""

    def apply(
        self, function: Function, matrices: Sequence[Matrix], own: list[Tensor]
    ) -> list[Tensor]:
        return [function(shard.flatten(1)).view(shard.shape) for shard in own]


class _Replicated(Exchange):
    """Shares matrices that every rank has among the ranks of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.size = group, group.size()

    def apply(
        self, function: Function, matrices: Sequence[Matrix], own: list[Tensor]
    ) -> list[Tensor]:
        rank = self._group.rank()
        results = [
            function(shard.flatten(1)).contiguous()
            if owner == rank
            else torch.empty_like(shard.flatten(1), memory_format=torch.contiguous_format)
            for owner, shard in enumerate(own)
        ]
        pending = [
            dist.broadcast(result, group=self._group, group_src=owner, async_op=True)
            for owner, result in enumerate(results)
        ]
        for work in pending:
            if work is not None:
                work.wait()
        return [result.view(shard.shape) for result, shard in zip(results, own, strict=True)]


class _Runs(Exchange):
    """Shares matrices of which each rank of a group has consecutive elements, in rank order.

    Args:
        group: The ranks.
        device: Where matrices are exchanged and computed; parts of them may be offloaded.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device, self.size = group, device, group.size()

    def apply(
        self, function: Function, matrices: Sequence[Matrix], own: list[Tensor]
    ) -> list[Tensor]:
        rank, idle = self._group.rank(), self.size - len(own)
        sent = [part.numel() for part in own] + [0] * idle
        is_busy = rank < len(matrices)
        received = matrices[rank].elements(self.size) if is_busy else [0] * self.size
        parts = torch.cat([part.reshape(-1) for part in own]).to(self._device)
        matrix = parts.new_empty(sum(received))
        dist.all_to_all_single(matrix, parts, received, sent, group=self._group)
        if is_busy:
            whole = matrix.view(matrices[rank].shape[0], -1)
            matrix = function(whole).reshape(-1)
        dist.all_to_all_single(parts, matrix, sent, received, group=self._group)
        results = zip(parts.split(sent), own, strict=False)
        return [result.view(part.shape).to(part.device) for result, part in results]


class _Gathered(Exchange):
    """Gathers matrices that are sharded in several dimensions on every rank."""

    def apply(
        self, function: Function, matrices: Sequence[Matrix], own: list[Tensor]
    ) -> list[Tensor]:
        results = []
        for item, shard in zip(matrices, own, strict=True):
            weight = item.owner
            assert isinstance(weight, DTensor)
            sharded = DTensor.from_local(
                shard.contiguous(),
                weight.device_mesh,
                weight.placements,
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
            full = sharded.full_tensor()
            result = function(full.flatten(1)).view(weight.shape)
            sizes, offsets = compute_local_shape_and_global_offset(
                weight.shape, weight.device_mesh, weight.placements
            )
            for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
                result = result.narrow(dim, offset, size)
            results.append(result.to(shard.device))
        return results


def exchange_of(matrix: Matrix) -> Exchange:
    """Return how the ranks share the work on a matrix and others that are placed like it."""
    weight = matrix.owner
    group = dist.group.WORLD if dist.is_initialized() else None
    if isinstance(matrix, FlatWeight):
        assert group is not None
        return _Runs(group, matrix.device)
    if not isinstance(weight, DTensor):
        return _Alone() if group is None or group.size() == 1 else _Replicated(group)
    mesh = weight.device_mesh
    sharding = [dim for dim, item in enumerate(weight.placements) if not item.is_replicate()]
    if len(sharding) == 1 and weight.placements[sharding[0]].is_shard(0):
        return _Runs(mesh.get_group(sharding[0]), torch.device(mesh.device_type))
    return _Gathered()


def rounds(matrices: Sequence[Matrix]) -> Iterator[tuple[Exchange, list[Matrix]]]:
    """Yield the matrices in the rounds in which the ranks work on them, the same on every rank.

    The matrices of a round have similar sizes, so that its ranks work for similar times.
    """
    placed: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        weight = matrix.owner
        key = (
            (weight.device_mesh, tuple(weight.placements)) if isinstance(weight, DTensor) else None
        )
        placed.setdefault((key, type(matrix), weight.dtype), []).append(matrix)
    for alike in placed.values():
        exchange = exchange_of(alike[0])
        alike.sort(key=lambda matrix: -matrix.shape.numel())
        for start in range(0, len(alike), exchange.size):
            yield exchange, alike[start : start + exchange.size]
