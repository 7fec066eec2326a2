"""Whole matrices of sharded or replicated weights, each computed on one rank.

Muon needs a matrix as a whole, and a rank under FSDP has some of its rows. The matrices are taken
in rounds of as many as there are ranks, similar sizes together. In a round each rank receives all
rows of one matrix (an all-to-all), computes with it, and sends the rows of the result back to the
ranks that hold them. Where every rank has all matrices (DDP), the ranks share the work as well, and
send each other the results.
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

Function = Callable[[Tensor], Tensor]
"""Takes a matrix of shape (rows, columns), and returns one of the same shape and dtype."""


class Exchange(ABC):
    """How the ranks share the work on whole matrices."""

    size: int = 1
    """The number of matrices in a round."""

    @abstractmethod
    def apply(self, function: Function, weights: list[Tensor], own: list[Tensor]) -> list[Tensor]:
        """Return this rank's shards of the results of `function` for whole matrices (collective).

        Args:
            function: What is computed for each matrix.
            weights: The weights of a round, at most `size`, from which shapes are taken.
            own: This rank's shard of each matrix, in the shape of its shard of the weight.
        """


class _Alone(Exchange):
    """Computes every matrix on this rank."""

    def apply(self, function: Function, weights: list[Tensor], own: list[Tensor]) -> list[Tensor]:
        return [function(shard.flatten(1)).view(shard.shape) for shard in own]


class _Replicated(Exchange):
    """Shares matrices that every rank has among the ranks of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.size = group, group.size()

    def apply(self, function: Function, weights: list[Tensor], own: list[Tensor]) -> list[Tensor]:
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


class _Rows(Exchange):
    """Shares matrices whose rows are spread over the ranks of a group, as FSDP spreads them."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device, self.size = group, device, group.size()

    def apply(self, function: Function, weights: list[Tensor], own: list[Tensor]) -> list[Tensor]:
        rank, idle = self._group.rank(), self.size - len(own)
        sent = [shard.numel() for shard in own] + [0] * idle
        received = [0] * self.size
        if rank < len(weights):
            row = weights[rank].shape[1:].numel()
            received = [rows * row for rows in rows_of_ranks(weights[rank].shape[0], self.size)]
        shards = torch.cat([shard.reshape(-1) for shard in own])
        matrix = shards.new_empty(sum(received))
        dist.all_to_all_single(matrix, shards, received, sent, group=self._group)
        if rank < len(weights):
            # Offloaded weights are on the host, and the device computes much faster.
            whole = matrix.view(weights[rank].shape[0], -1).to(self._device)
            matrix = function(whole).to(matrix.device).reshape(-1)
        dist.all_to_all_single(shards, matrix, sent, received, group=self._group)
        parts = shards.split(sent)
        return [part.view(shard.shape) for part, shard in zip(parts, own, strict=False)]


class _Gathered(Exchange):
    """Gathers matrices that are sharded in several dimensions on every rank."""

    def apply(self, function: Function, weights: list[Tensor], own: list[Tensor]) -> list[Tensor]:
        results = []
        for weight, shard in zip(weights, own, strict=True):
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


def rows_of_ranks(num_rows: int, num_ranks: int) -> list[int]:
    """Return how many rows of a matrix each rank has under FSDP."""
    share = -(-num_rows // num_ranks)
    return [min(share, max(num_rows - rank * share, 0)) for rank in range(num_ranks)]


def exchange_of(weight: Tensor) -> Exchange:
    """Return how the ranks share the work on a weight and others that are placed like it."""
    if not isinstance(weight, DTensor):
        group = dist.group.WORLD if dist.is_initialized() else None
        return _Alone() if group is None or group.size() == 1 else _Replicated(group)
    mesh = weight.device_mesh
    sharding = [dim for dim, item in enumerate(weight.placements) if not item.is_replicate()]
    if len(sharding) == 1 and weight.placements[sharding[0]].is_shard(0):
        return _Rows(mesh.get_group(sharding[0]), torch.device(mesh.device_type))
    return _Gathered()


def rounds(weights: Sequence[Tensor]) -> Iterator[tuple[Exchange, list[Tensor]]]:
    """Yield the weights in the rounds in which the ranks work on them, the same on every rank.

    The matrices of a round have similar sizes, so that its ranks work for similar times.
    """
    placed: dict[Any, list[Tensor]] = {}
    for weight in weights:
        is_sharded = isinstance(weight, DTensor)
        key = (weight.device_mesh, tuple(weight.placements)) if is_sharded else None  # type: ignore[attr-defined]
        placed.setdefault((key, weight.dtype), []).append(weight)
    for alike in placed.values():
        exchange = exchange_of(alike[0])
        alike.sort(key=lambda weight: -weight.numel())
        for start in range(0, len(alike), exchange.size):
            yield exchange, alike[start : start + exchange.size]
