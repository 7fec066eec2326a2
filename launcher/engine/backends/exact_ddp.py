"""Exact training under DistributedDataParallel.

Each rank adds the gradients of its own virtual ranks in the order of the tree, which leaves it with
the sums over a few nodes. For each of DDP's buckets, the ranks then exchange these sums so that
each rank has those of all ranks for its slice of the bucket (an all-to-all), adds them in the order
of the tree, and gathers the slices of the other ranks (an all-gather). If every rank's virtual
ranks form one node, this moves 2 (W - 1) / W of the gradient per rank, as a ring all-reduce does.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

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

    def prepare(self, *args: Any) -> tuple[nn.Module, Optimizer]:
        prepared = super().prepare(*args)
        self._watch_parameters(self._module)
        self._indices = {parameter: i for i, parameter in enumerate(self._exact_parameters)}
        self._exchange = TreeExchange(self.plan.distribution, self.rank)
        self._last_part: Part | None = None
        self._buckets: list[_Exchanged] = []
        self._waited, self._num_waits = 0.0, 0
        # A lambda, because DDP refuses a hook with annotations that are strings.
        self._wrapped.register_comm_hook(None, lambda _, bucket: self._on_bucket(bucket))
        return prepared

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
        part, gradients = self._last_part, list(bucket.gradients())
        indices = [self._indices[parameter] for parameter in bucket.parameters()]
        tree: TreeSum[Gradients] = TreeSum(self.plan.distribution.count, add_gradients)
        tree.pending = [
            (node, [held[index] for index in indices]) for node, held in self._tree.pending
        ]
        flat = bucket.buffer()
        if part is not None and part.virtual_rank is not None:
            if part.is_empty:
                flat.zero_()
            tree.push(part.virtual_rank, gradients)
        sums = [
            flat if held is gradients else torch.cat([gradient.view(-1) for gradient in held])
            for _, held in tree.pending
        ]
        self._buckets.append(self._exchange.start(sums, flat))
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=None if flat.device.type == "cpu" else [flat.device]
        )
        future.set_result(flat)
        return future

    def _finish_buckets(self) -> None:
        """Add the sums of all ranks, and write the result into DDP's buckets."""
        started = time.perf_counter()
        for bucket in self._buckets:
            self._exchange.add(bucket)
        for bucket in self._buckets:
            self._exchange.finish(bucket)
        self._buckets, self._tree.pending = [], []
        self._waited += time.perf_counter() - started
        self._num_waits += 1

    def communication(self) -> tuple[float, int]:
        return (self._waited, self._num_waits) if self.device.type == "cpu" else (0.0, 0)


class _Exchanged:
    """The exchange of one bucket that is under way."""

    def __init__(self, target: Tensor, sent: Tensor, received: Tensor, work: Any) -> None:
        self.target, self.received, self.work = target, received, work
        self.sent: Tensor | None = sent
        """What this rank sends, until it has been sent."""


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

    def start(self, sums: list[Tensor], target: Tensor) -> _Exchanged:
        """Start to exchange the sums over this rank's nodes (collective).

        Args:
            sums: A vector for each of this rank's nodes, all of the same size. They must not be
                changed before `add`.
            target: The vector that receives the sum over all virtual ranks. It may be one of
                `sums`.
        """
        slices = self._slices(target.numel())
        own_size = len(slices[self._rank])
        if len(sums) == 1:
            sent = sums[0]
        else:
            sent = torch.cat([held[piece.start : piece.stop] for piece in slices for held in sums])
        received = target.new_empty(len(self._nodes) * own_size)
        work = dist.all_to_all_single(
            received,
            sent,
            [num_nodes * own_size for num_nodes in self._num_nodes],
            [len(sums) * len(piece) for piece in slices],
            async_op=True,
        )
        return _Exchanged(target, sent, received, work)

    def add(self, bucket: _Exchanged) -> None:
        """Add this rank's slice of all sums and start to gather all slices (collective)."""
        bucket.work.wait()
        bucket.sent = None
        size = bucket.target.numel()
        slice_size = ceil_div(size, self._world_size)
        own_size = len(self._slices(size)[self._rank])
        tree: TreeSum[Gradients] = TreeSum(self._count, add_gradients)
        for node, held in zip(self._nodes, bucket.received.view(len(self._nodes), -1), strict=True):
            tree.push_node(node, [held])
        root = tree.take()
        own = bucket.target.new_zeros(slice_size)
        own[:own_size] = root[0]
        bucket.received = bucket.target.new_empty(slice_size * self._world_size)
        bucket.work = dist.all_gather_single(bucket.received, own, async_op=True)
        bucket.sent = own

    def finish(self, bucket: _Exchanged) -> None:
        """Write the sum over all virtual ranks to the target."""
        bucket.work.wait()
        bucket.target.copy_(bucket.received[: bucket.target.numel()])

    def _slices(self, size: int) -> list[range]:
        """Return the positions of each rank's slice of a vector."""
        slice_size = ceil_div(size, self._world_size)
        return [
            range(min(rank * slice_size, size), min((rank + 1) * slice_size, size))
            for rank in range(self._world_size)
        ]
