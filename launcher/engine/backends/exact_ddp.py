"""Exact training under DistributedDataParallel.

Each rank adds the gradients of its own virtual ranks in the order of the tree, which leaves it with
the sums over a few nodes. For each of DDP's buckets, the ranks then exchange these sums so that
each rank has those of all ranks for its slice of the bucket (an all-to-all), adds them in the order
of the tree, and sends its slice to the other ranks (an all-to-all that gathers, because gloo's
all-gather takes longer). If every rank's virtual ranks form one node, this moves 2 (W - 1) / W of
the gradient per rank, as a ring all-reduce does.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.engine.backends.accelerate import DDPBackend
from launcher.engine.backends.exact import (
    ExactSums,
    Gradients,
    add_gradients,
)
from launcher.planning.global_batch import ceil_div
from launcher.planning.virtual_ranks import Node, Part, TreeSum, VirtualRanks


class ExactDDPBackend(ExactSums, DDPBackend):
    """A backend in which every rank holds the whole model, with exact sums over ranks."""

    def prepare_objective(self, model: nn.Module) -> nn.Module:
        wrapped = super().prepare_objective(model)
        self._indices = {parameter: i for i, parameter in enumerate(self._exact_parameters)}
        self._exchange = TreeExchange(self.plan.distribution, self.rank)
        self._last_part: Part | None = None
        self._waited, self._num_waits = 0.0, 0
        # A lambda, because DDP refuses a hook with annotations that are strings.
        self._wrapped.register_comm_hook(None, lambda _, bucket: self._on_bucket(bucket))
        return wrapped

    @contextlib.contextmanager
    def micro_step(self, *, last: bool, part: Part | None = None) -> Iterator[None]:
        self._last_part = part
        with super().micro_step(last=last, part=part):
            yield
        if last or part is None or not part.is_last:
            return
        if part.virtual_rank is None:
            self._drop_gradients()
        else:
            self._push_part(part)

    def backward(self, loss: Tensor, weight: float | Tensor) -> None:
        super().backward(loss, weight)
        if self._averages_gradients:
            self._finish_buckets()

    def _on_bucket(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Start the exchange of a bucket in which this rank's last gradients have arrived.

        DDP calls this for the buckets in the same order on every rank.

        Args:
            bucket: A `torch.distributed.GradBucket`.
        """
        parameters, flat = bucket.parameters(), bucket.buffer()
        part, gradients = self._last_part, _views(flat, parameters)
        indices = [self._indices[parameter] for parameter in parameters]
        tree: TreeSum[Gradients] = TreeSum(self.plan.distribution.count, add_gradients)
        tree.pending = [
            (node, [held[index] for index in indices]) for node, held in self._tree.pending
        ]
        if part is not None and part.virtual_rank is not None:
            if part.is_empty:
                flat.zero_()
            tree.push(part.virtual_rank, gradients)
        sums = [
            flat if held is gradients else _flattened(held, flat, parameters)
            for _, held in tree.pending
        ]
        self._exchange.start(sums, flat)
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=None if flat.device.type == "cpu" else [flat.device]
        )
        future.set_result(flat)
        return future

    def _finish_buckets(self) -> None:
        """Add the sums of all ranks, and write the result into DDP's buckets."""
        started = time.perf_counter()
        self._exchange.finish()
        self._tree.pending = []
        self._waited += time.perf_counter() - started
        self._num_waits += 1

    def own_communication(self) -> tuple[float, int]:
        return (self._waited, self._num_waits) if self.device.type == "cpu" else (0.0, 0)


def _views(flat: Tensor, parameters: list[Tensor]) -> Gradients:
    """Return the gradients in a bucket, each with the strides of its parameter, as DDP's own."""
    views, offset = [], flat.storage_offset()
    for parameter in parameters:
        views.append(flat.as_strided(parameter.size(), parameter.stride(), offset))
        offset += parameter.numel()
    return views


def _flattened(gradients: Gradients, like: Tensor, parameters: list[Tensor]) -> Tensor:
    """Return gradients in a new vector, in the order of a bucket."""
    flat = torch.empty_like(like)
    torch._foreach_copy_(_views(flat, parameters), gradients)
    return flat


@dataclass(kw_only=True)
class _Exchanged:
    """The memory for the exchanges of one bucket, which later steps use again."""

    received: Tensor
    """The sums over all nodes, for this rank's slice of the bucket."""

    repeated: Tensor
    """This rank's slice of the sum over all virtual ranks, once for each rank."""

    target: Tensor
    """The bucket."""

    sent: Tensor
    """What this rank sends; it must not be changed until it has been sent."""

    work: Any = None
    """The collective that is under way."""


class TreeExchange:
    """Adds vectors over ranks in the order of the tree.

    Args:
        distribution: The distribution of virtual ranks over ranks, in contiguous ranges.
        rank: This rank.
    """

    def __init__(self, distribution: VirtualRanks, rank: int) -> None:
        self._count, self._world_size, self._rank = (
            distribution.count,
            distribution.world_size,
            rank,
        )
        nodes = [distribution.nodes_of_rank(other) for other in range(distribution.world_size)]
        self._num_nodes = [len(of_rank) for of_rank in nodes]
        self._nodes: list[Node] = [node for of_rank in nodes for node in of_rank]
        self._started: list[_Exchanged] = []
        self._memory: list[_Exchanged] = []

    def start(self, sums: list[Tensor], target: Tensor) -> None:
        """Start to exchange the sums over this rank's nodes (collective).

        Args:
            sums: A vector for each of this rank's nodes, all of the same size. They must not be
                changed before `finish`.
            target: The vector that receives the sum over all virtual ranks in `finish`. It may be
                one of `sums`.
        """
        slices = self._slices(target.numel())
        own_size = len(slices[self._rank])
        bucket = self._take_memory(target, own_size)
        bucket.sent = (
            sums[0]
            if len(sums) == 1
            else torch.cat([held[piece.start : piece.stop] for piece in slices for held in sums])
        )
        bucket.work = dist.all_to_all_single(
            bucket.received,
            bucket.sent,
            [num_nodes * own_size for num_nodes in self._num_nodes],
            [len(sums) * len(piece) for piece in slices],
            async_op=True,
        )
        self._started.append(bucket)

    def finish(self) -> None:
        """Add the sums of all ranks, and write the results to the targets (collective)."""
        started, self._started = self._started, []
        for bucket in started:
            bucket.work.wait()
            self._add(bucket)
        for bucket in started:
            bucket.work.wait()
            bucket.work, bucket.sent = None, bucket.target

    def _add(self, bucket: _Exchanged) -> None:
        """Add this rank's slice of all sums, and start to send it to the other ranks."""
        slices = self._slices(bucket.target.numel())
        own_size = len(slices[self._rank])
        tree: TreeSum[Gradients] = TreeSum(self._count, add_gradients)
        received = bucket.received.view(len(self._nodes), own_size)
        for node, held in zip(self._nodes, received, strict=True):
            tree.push_node(node, [held])
        bucket.repeated.view(self._world_size, own_size)[:] = tree.take()[0]
        bucket.work = dist.all_to_all_single(
            bucket.target,
            bucket.repeated,
            [len(piece) for piece in slices],
            [own_size] * self._world_size,
            async_op=True,
        )

    def _take_memory(self, target: Tensor, own_size: int) -> _Exchanged:
        """Return the memory of the next bucket, which DDP may have changed since the last step."""
        index = len(self._started)
        known = self._memory[index : index + 1]
        if known and known[0].target.shape == target.shape and known[0].sent.dtype == target.dtype:
            known[0].target = target
            return known[0]
        bucket = _Exchanged(
            received=target.new_empty(len(self._nodes) * own_size),
            repeated=target.new_empty(self._world_size * own_size),
            target=target,
            sent=target,
        )
        self._memory[index:] = [bucket]
        return bucket

    def _slices(self, size: int) -> list[range]:
        """Return the positions of each rank's slice of a vector."""
        slice_size = ceil_div(size, self._world_size)
        return [
            range(min(rank * slice_size, size), min((rank + 1) * slice_size, size))
            for rank in range(self._world_size)
        ]
