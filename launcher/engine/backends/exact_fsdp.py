"""Exact training under FSDP2, with a reduce-scatter that adds in the order of the tree.

FSDP reduces gradients in every micro-step. In each round, the W ranks compute W neighbouring
virtual ranks, and each rank receives the gradients of all of them for its own shard, which moves as
much as a reduce-scatter. It adds them in the order of the tree, and keeps the sums over complete
nodes until the next round: at most one for each level above a round, each of the size of a shard.

Where several groups of ranks hold copies of the model, each group computes a contiguous range of
the virtual ranks in this way. After the last round, the ranks that hold the same shard exchange the
sums over the nodes of their ranges in an all-to-all, and each adds a slice of the shard in the
order of the tree. FSDP then sums the shard over the groups, and every element is -0.0 on all of
them but one, so that this sum has the bits of that element.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from launcher.engine.backends.base import Backend
from launcher.engine.backends.exact import (
    ExactSums,
    Gradients,
    add_gradients,
    num_rows,
)
from launcher.engine.backends.exact_norm import exact_norm
from launcher.engine.backends.fsdp import FSDPBackend
from launcher.errors import RecipeError
from launcher.planning.global_batch import part
from launcher.planning.virtual_ranks import Part, TreeSum, VirtualRanks


class _Round:
    """The virtual ranks that the ranks compute at the same time."""

    virtual_ranks: range = range(0)
    """The virtual ranks, in the order of the ranks that compute them."""

    is_last = False
    """Whether it is the last round of the step."""

    has_gradients = False
    """Whether this rank computes one of them that has samples."""

    squares: Tensor | None = None
    """Receives, for each virtual rank, the sum of squares of this rank's shards of its gradient, as
    float64; None if they are not recorded."""


class ExactFSDPBackend(ExactSums, FSDPBackend):
    """A backend in which each rank holds a shard of every weight, with exact sums over ranks."""

    def prepare(self, *args: Any) -> tuple[nn.Module, Optimizer]:
        wrapped, optimizer = super().prepare(*args)
        _check_fused(optimizer)
        self._watch_parameters(self._module)
        self._round, self._round_number = _Round(), 0
        self._sums = []
        self._group = self.rank // self.plan.distribution.group_size
        mesh = self._accelerator.state.device_mesh
        self._same_shards = mesh["dp_replicate"].get_group() if self._copies > 1 else None
        self._shard_group = mesh["dp_shard"].get_group()
        for module in wrapped.modules():
            if isinstance(module, FSDPModule):
                tree_sum = TreeReduceScatter(
                    self.plan.distribution,
                    self._group,
                    self._round,
                    same_shards=self._same_shards,
                    is_offloaded=bool(self.recipe.offload),
                )
                module.set_custom_reduce_scatter(tree_sum)
                module.set_gradient_divide_factor(1.0)
                self._sums.append(tree_sum)
        return wrapped, optimizer

    def for_objective(self, *args: Any) -> tuple[Backend, nn.Module, Optimizer]:
        prepared = super().for_objective(*args)
        _check_fused(prepared[-1])
        return prepared

    @contextlib.contextmanager
    def micro_step(self, *, last: bool, part: Part | None = None) -> Iterator[None]:
        assert part is not None
        current = self._round
        distribution = self.plan.distribution
        current.virtual_ranks = distribution.of_round(self._round_number, self._group)
        current.is_last = self._round_number == distribution.rounds - 1
        current.has_gradients = part.virtual_rank is not None and not part.is_empty
        if part.micro_step or not part.is_last:
            # The gradients of a virtual rank's micro-batches are added before the exchange.
            for unit in self._units:
                unit.set_requires_gradient_sync(part.is_last, recurse=False)
        with super().micro_step(last=last, part=part):
            yield
        self._round_number += part.is_last

    def record_squares(self) -> None:
        """Record the squares of the gradients that the ranks exchange in the coming step."""
        self._round.squares = torch.zeros(
            self.plan.distribution.count, dtype=torch.float64, device=self.device
        )

    def take_squares(self) -> Tensor:
        """Return the recorded squares of this rank's shards, by virtual rank; record no more."""
        squares, self._round.squares = self._round.squares, None
        assert squares is not None
        return squares

    def apply(self, optimizer: Optimizer, max_grad_norm: float | None) -> Tensor:
        self._round_number = 0
        for tree_sum in self._sums:
            tree_sum.finish()
        return super().apply(optimizer, max_grad_norm)

    def norm(self, grads: list[Tensor]) -> Tensor:
        if not grads:
            return super().norm(grads)
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        return exact_norm(local, num_rows(grads), self._sum_over_ranks, self._max_over_ranks)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self._shard_group)
        return values

    def _max_over_ranks(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._shard_group)
        return values


def _check_fused(optimizer: Optimizer) -> None:
    """Refuse fused kernels, which round some elements of a shard otherwise than others on CPUs.

    Raises:
        RecipeError: A parameter group uses them.
    """
    if any(group.get("fused") for group in optimizer.param_groups):
        raise RecipeError(
            "exact=true with strategy=fsdp needs an optimizer that rounds each element alike, and "
            "the fused kernels of the recipe's optimizer round the last elements of a shard "
            "otherwise. Create it with foreach=True in place of fused=True."
        )


class TreeReduceScatter(ReduceScatter):
    """Replaces the reduce-scatter of one group of FSDP's parameters.

    The output is -0.0 in all rounds but the last one of a step, so FSDP accumulates the sum over
    all virtual ranks: x + -0.0 has the bits of x for every x, whereas -0.0 + 0.0 is 0.0.

    Args:
        distribution: The distribution of virtual ranks over ranks, interleaved.
        group: The group of this rank, which shares the parameters.
        current: The round that is being computed, which the backend updates.
        same_shards: The ranks that hold the same shards, one of each group; None if there is one
            group.
        is_offloaded: Whether FSDP copies the output to the host after each round.
    """

    def __init__(
        self,
        distribution: VirtualRanks,
        group: int,
        current: _Round,
        *,
        same_shards: dist.ProcessGroup | None = None,
        is_offloaded: bool = False,
    ) -> None:
        self._round, self._is_offloaded = current, is_offloaded
        self._tree: TreeSum[Gradients | None] = TreeSum(distribution.count, _add_present)
        self._virtual_ranks = distribution.of_group(group)
        self._next = self._virtual_ranks.start
        self._exchange = (
            None if same_shards is None else _GroupExchange(distribution, group, same_shards)
        )
        self._first_output: Tensor | None = None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return a new tensor for FSDP to communicate from or to."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Exchange the gradients of a round (collective).

        Args:
            output_tensor: Receives this rank's shard of the sum, of shape (shard,).
            input_tensor: The gradients of this rank's virtual rank, of shape (ranks x shard,).
            group: The ranks that share the parameters.
            op: Ignored: the loss is divided instead of the gradients.
            async_op: Ignored: the current stream waits.
        """
        del op, async_op
        current = self._round
        if not current.has_gradients:
            input_tensor.zero_()
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        rows = received.view(group.size(), -1)
        for virtual_rank, row in zip(current.virtual_ranks, rows, strict=False):
            if current.squares is not None:
                current.squares[virtual_rank] += row.double().square_().sum()
            self._skip_to(virtual_rank)
            self._push(virtual_rank, [row])
        output_tensor.fill_(-0.0)
        if self._first_output is None:
            self._first_output = output_tensor
        if current.is_last:
            self._skip_to(self._virtual_ranks.stop)
            self._take_into(output_tensor)
        else:  # a row would keep those of all ranks in memory
            storage = received.untyped_storage().data_ptr()
            self._tree.replace(lambda held: _own(held, storage))

    def finish(self) -> None:
        """Add what is left, if no rank used these parameters in the last round of the step.

        Raises:
            RecipeError: The gradients have been moved to the host, or are to be added over copies,
                so that they cannot be completed.
        """
        if self._tree.pending and (self._is_offloaded or self._exchange is not None):
            setting, remedy = "offload=cpu", "leave offload out"
            if not self._is_offloaded:
                setting, remedy = "several copies of the model", "use shard=all"
            raise RecipeError(
                f"exact=true with strategy=fsdp and {setting} needs every block in the last part "
                "of a batch, and the model has left out a block there. Call all blocks for every "
                f"part and multiply what is not needed by 0, or {remedy}."
            )
        if self._tree.pending:
            output = self._first_output
            assert output is not None
            self._skip_to(self._virtual_ranks.stop)
            self._take_into(output)
        self._first_output = None

    def _take_into(self, output: Tensor) -> None:
        if self._exchange is not None:
            self._exchange.add_into(output, self._tree)
        else:
            root = self._tree.take()
            if root is not None:
                output.copy_(root[0])
        self._next = self._virtual_ranks.start
        self._first_output = None

    def _push(self, virtual_rank: int, gradients: Gradients | None) -> None:
        self._tree.push(virtual_rank, gradients)
        self._next = virtual_rank + 1

    def _skip_to(self, virtual_rank: int) -> None:
        """Add nothing for virtual ranks before `virtual_rank` that did not use these parameters."""
        for skipped in range(self._next, virtual_rank):
            self._push(skipped, None)


class _GroupExchange:
    """Adds the shards of gradients over the ranks that hold the same one, in the order of the tree.

    Args:
        distribution: The distribution of virtual ranks over the groups.
        group: The group of this rank.
        same_shards: The ranks that hold the same shards, in the order of their groups.
    """

    def __init__(
        self, distribution: VirtualRanks, group: int, same_shards: dist.ProcessGroup
    ) -> None:
        self._count, self._index, self._same_shards = distribution.count, group, same_shards
        self._nodes = [distribution.nodes_of_group(other) for other in range(distribution.groups)]

    def add_into(self, output: Tensor, tree: TreeSum[Gradients | None]) -> None:
        """Write this rank's slice of the sum over all virtual ranks (collective).

        Args:
            output: The shard of this rank; it must contain -0.0.
            tree: The sums over the nodes of this group, which are taken out of it.
        """
        cuts = [part(output.numel(), len(self._nodes), index) for index in range(len(self._nodes))]
        own = cuts[self._index]
        sums = [torch.zeros_like(output) if held is None else held[0] for _, held in tree.pending]
        tree.pending = []
        nodes = [node for of_group in self._nodes for node in of_group]
        received = output.new_empty(len(nodes) * len(own))
        dist.all_to_all_single(
            received,
            torch.cat([held[cut.start : cut.stop] for cut in cuts for held in sums]),
            [len(of_group) * len(own) for of_group in self._nodes],
            [len(sums) * len(cut) for cut in cuts],
            group=self._same_shards,
        )
        total: TreeSum[Gradients] = TreeSum(self._count, add_gradients)
        for node, row in zip(nodes, received.view(len(nodes), len(own)), strict=True):
            total.push_node(node, [row])
        output[own.start : own.stop] = total.take()[0]


def _add_present(left: Gradients | None, right: Gradients | None) -> Gradients | None:
    if left is None or right is None:
        present = left if right is None else right
        return None if present is None else [tensor.add_(0.0) for tensor in present]
    return add_gradients(left, right)


def _own(held: Gradients | None, storage: int) -> Gradients | None:
    """Return gradients that do not share the storage at an address."""
    if held is None or held[0].untyped_storage().data_ptr() != storage:
        return held
    return [tensor.clone() for tensor in held]
