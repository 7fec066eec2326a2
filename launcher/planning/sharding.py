"""How FSDP shards weights over ranks, and what the ranks send each other for it.

Within a group of neighbouring ranks, each rank holds one shard of every weight. With several
groups, each group holds a copy of the model (hybrid sharding, HSDP): weights are gathered within a
group, and groups only exchange gradients. A group that lies within a node keeps the gathering off
the links between nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from launcher.errors import PlanError
from launcher.planning.strategy import STRATEGIES
from launcher.recipe.recipe import Recipe

_SHOWN_GROUPS = 3
"""Groups whose ranks are listed."""

_SHOWN_SIZES = 12
"""Sizes of groups that a refusal lists."""


class Sent(NamedTuple):
    """What is sent in a step, in multiples of the size of all weights."""

    inside: float
    """Sent by each rank to ranks of its own node, on average."""

    between: float
    """Sent by all ranks of a node together to other nodes."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """The groups of ranks that share the shards of the weights.

    Ranks are numbered node by node, and a group consists of neighbours.
    """

    nodes: int
    """Number of nodes."""

    nproc_per_node: int
    """Ranks, or data ranks, on each node."""

    size: int
    """Ranks in a group: the number of shards of each weight."""

    tensor_parallel: int = 1
    """Ranks of a data rank, each of which shards its own part of every weight."""

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.nodes * self.nproc_per_node

    @property
    def copies(self) -> int:
        """Return the number of groups, each of which holds all weights."""
        return self.world_size // self.size

    def gathered(self) -> Sent:
        """Return what a ring sends to gather all weights in each group, or to reduce gradients.

        Each rank sends (S - 1) / S of the weights to its neighbour in a ring of S ranks.
        """
        crossing = max(self.size // self.nproc_per_node, 1) if self.spans_nodes else 0
        each = (self.size - 1) / self.size
        inside = each * (self.size - crossing) / self.size / self.tensor_parallel
        return Sent(inside, each if crossing else 0.0)

    def summed_over_copies(self) -> Sent:
        """Return what rings send to add the gradients of all groups.

        For each shard, R ranks form a ring, in which each sends 2 (R - 1) / R of the shard.
        """
        copies = self.copies
        each = 2 * (copies - 1) / copies / self.size
        if self.nodes == 1:
            return Sent(each / self.tensor_parallel, 0.0)
        if self.size >= self.nproc_per_node:  # the next copy of a shard is on another node
            return Sent(0.0, each * self.nproc_per_node)
        inside = each * (copies - self.nodes) / copies / self.tensor_parallel
        return Sent(inside, each * self.size)

    @property
    def spans_nodes(self) -> bool:
        return self.size > self.nproc_per_node

    def text(self) -> str:
        """Return which ranks share shards, and which hold the same ones."""
        unit = "ranks" if self.tensor_parallel == 1 else "data ranks"
        if self.world_size == 1:
            return "one data rank has all weights"
        groups = [
            f"{unit} {first}-{first + self.size - 1}"
            for first in range(0, self.world_size, self.size)[:_SHOWN_GROUPS]
        ]
        if self.copies == 1:
            return f"{groups[0]} share all weights: each holds 1/{self.size}"
        more = ", ..." if self.copies > _SHOWN_GROUPS else ""
        same = ", ".join(map(str, range(0, self.world_size, self.size)[:_SHOWN_GROUPS]))
        return (
            f"{', '.join(groups)}{more} each share all weights, 1/{self.size} on a rank; {unit} "
            f"{same}{more} hold the same shard"
        )


def sharding_for(recipe: Recipe, nodes: int, ranks_per_node: int) -> Sharding | None:
    """Return which ranks share the shards of a weight; None for strategies other than FSDP.

    Args:
        recipe: The recipe, whose `shard` says over how many ranks a weight is sharded.
        nodes: Number of nodes.
        ranks_per_node: Ranks on each node, a multiple of those of a data rank. On nodes of one
            data rank, `shard=node` is all of them.

    Raises:
        PlanError: Groups of the size that was asked for cannot be formed.
    """
    if not STRATEGIES[recipe.strategy].uses_fsdp:
        return None
    nproc_per_node = ranks_per_node // recipe.tensor_parallel
    world_size, shard = nodes * nproc_per_node, recipe.shard
    if shard == "all" or (shard == "node" and nproc_per_node == 1):
        size = world_size
    else:
        size = nproc_per_node if shard == "node" else int(shard)
    if size not in _sizes(nodes, nproc_per_node) and (shard == size or world_size > 1):
        raise PlanError(_refusal(size, nodes, nproc_per_node))
    return Sharding(
        nodes=nodes,
        nproc_per_node=nproc_per_node,
        size=size,
        tensor_parallel=recipe.tensor_parallel,
    )


def _sizes(nodes: int, nproc_per_node: int) -> list[int]:
    """Return the possible sizes of groups: parts of a node, or several whole nodes."""
    inside = [size for size in _divisors(nproc_per_node) if size > 1]
    return [*inside, *(nproc_per_node * count for count in _divisors(nodes) if count > 1)]


def _divisors(number: int) -> list[int]:
    low = [divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0]
    return sorted({*low, *(number // divisor for divisor in low)})


def _refusal(size: int, nodes: int, nproc_per_node: int) -> str:
    world_size = nodes * nproc_per_node
    if size == 1:
        return (
            "shard=1 keeps every weight whole on each rank, which is strategy=ddp. Use "
            "strategy=ddp, or shard=2 or more."
        )
    possible = _sizes(nodes, nproc_per_node)
    listed = ", ".join(map(str, possible[:_SHOWN_SIZES]))
    if len(possible) > _SHOWN_SIZES:
        listed += f", ..., {world_size}"
    problem = (
        "does not divide them"
        if world_size % size
        else f"is neither a part of the {nproc_per_node} ranks of a node nor several whole nodes"
    )
    return (
        f"shard={size} was asked for on {world_size:,} ranks ({nodes:,} x {nproc_per_node:,}), and "
        f"{size} {problem}. Use shard=node, shard=all or one of {listed}."
    )
