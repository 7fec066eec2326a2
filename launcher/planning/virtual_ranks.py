"""Virtual ranks: a division of every batch that does not depend on the number of ranks.

A recipe with `virtual_ranks=V` cuts each batch into V parts, one for each virtual rank. Each part
goes through the model by itself, with its own random numbers and its own BatchNorm statistics, so
what a part computes does not depend on the rank that computes it. W ranks share the V virtual
ranks; any W from 1 to V works.

With `exact=true` the V gradients are also summed in one fixed order, that of a binary tree whose
leaves are the virtual ranks. A node over n leaves splits after the largest power of two below n, so
a node over a power of two is split in halves. Floating-point addition is not associative, but each
node always adds the same two numbers, so the root has the same bits on any number of ranks.

The idea is that of EasyScale (Li et al., SC'23) and VirtualFlow (Or et al., MLSys 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from launcher.planning.global_batch import ceil_div, part

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class VirtualRanks:
    """The distribution of virtual ranks over ranks."""

    count: int
    """Number of virtual ranks."""

    world_size: int
    """Number of ranks, at most `count`."""

    interleaved: bool = False
    """Whether rank r takes the virtual ranks r, r + W, r + 2W and so on, so that the ranks compute
    neighbours at the same time; False gives each rank a contiguous range."""

    groups: int = 1
    """Number of groups of interleaved ranks. Each has a contiguous range of the virtual ranks, and
    is interleaved within itself."""

    @property
    def rounds(self) -> int:
        """Return the largest number of virtual ranks of any rank."""
        return ceil_div(self.count, self.world_size)

    def of_rank(self, rank: int) -> range:
        """Return the virtual ranks of a rank, in the order in which it computes them."""
        if self.interleaved:
            group, index = divmod(rank, self.group_size)
            return self.of_group(group)[index :: self.group_size]
        return part(self.count, self.world_size, rank)

    @property
    def group_size(self) -> int:
        """Return the number of ranks in a group."""
        return self.world_size // self.groups

    def of_group(self, group: int) -> range:
        """Return the virtual ranks that a group of interleaved ranks computes."""
        return part(self.count, self.groups, group)

    def of_round(self, number: int, group: int = 0) -> range:
        """Return the virtual ranks that interleaved ranks compute in a round, in rank order.

        Args:
            number: The round, counted from 0.
            group: The group of the ranks.
        """
        return self.of_group(group)[number * self.group_size : (number + 1) * self.group_size]

    def nodes_of_rank(self, rank: int) -> list[Node]:
        """Return the largest nodes of the tree that cover the range of a rank, in order."""
        return self._nodes(self.of_rank(rank))

    def nodes_of_group(self, group: int) -> list[Node]:
        """Return the largest nodes of the tree that cover the range of a group, in order."""
        return self._nodes(self.of_group(group))

    def _nodes(self, leaves: range) -> list[Node]:
        tree: TreeSum[None] = TreeSum(self.count, lambda _, __: None)
        for leaf in leaves:
            tree.push(leaf, None)
        return [node for node, _ in tree.pending]

    def most_copies(self) -> int:
        """Return how many copies of the gradients a rank holds at once, at most.

        Under interleaved ranks these are copies of its shard: the sums over nodes that it keeps
        between two rounds, and the total. Several groups then exchange the sums over their nodes.
        """
        if self.interleaved and self.groups == 1:
            rounds = range(1, self.rounds)
            return 1 + max(((number * self.world_size).bit_count() for number in rounds), default=0)
        if self.interleaved:
            ranges = [self.of_group(group) for group in range(self.groups)]
            kept = [
                len(self._nodes(leaves[: number * self.group_size]))
                for leaves in ranges
                for number in range(1, self.rounds + 1)
            ]
            return 1 + max(kept)
        deepest = 0
        for rank in range(self.world_size):
            tree: TreeSum[None] = TreeSum(self.count, lambda _, __: None)
            for leaf in self.of_rank(rank):
                deepest = max(deepest, len(tree.pending) + 1)
                tree.push(leaf, None)
        return deepest


class Part(NamedTuple):
    """Which part of a global batch a micro-batch belongs to, if the recipe has virtual ranks."""

    virtual_rank: int | None
    """The virtual rank; None if this rank has fewer virtual ranks than others, and only takes part
    in collectives."""

    micro_step: int
    """Index of the micro-batch among those of its virtual rank."""

    is_last: bool
    """Whether it is the last micro-batch of its virtual rank in the step."""

    is_empty: bool
    """Whether the virtual rank has no sample in the step: the last batch of an epoch is short."""


def virtual_rank_of(part: Part | None) -> int:
    """Return the virtual rank of a micro-batch that has samples and belongs to one."""
    assert part is not None
    assert part.virtual_rank is not None
    return part.virtual_rank


class Node(NamedTuple):
    """A node of the tree: the virtual ranks from `start` up to, but not including, `stop`."""

    start: int
    stop: int


class TreeSum(Generic[T]):
    """A sum over virtual ranks in the order of the tree, from values that arrive in order.

    It holds the sums of the largest nodes that are complete, at most one for each level.

    Args:
        count: Number of virtual ranks.
        add: Returns the sum of two values; it may change and return either.
    """

    def __init__(self, count: int, add: Callable[[T, T], T]) -> None:
        self._count, self._add = count, add
        self.pending: list[tuple[Node, T]] = []
        """The sums that have not been added to each other, with their nodes in order."""

    def push(self, leaf: int, value: T) -> None:
        """Add the value of one virtual rank, which must follow those that were added before."""
        self.push_node(Node(leaf, leaf + 1), value)

    def push_node(self, node: Node, value: T) -> None:
        """Add the sum over a node, which must follow those that were added before."""
        while self.pending and _are_siblings(self.pending[-1][0], node, self._count):
            left, left_value = self.pending.pop()
            node, value = Node(left.start, node.stop), self._add(left_value, value)
        self.pending.append((node, value))

    @property
    def end(self) -> int:
        """Return the virtual rank after the last one that was added; 0 if there was none."""
        return self.pending[-1][0].stop if self.pending else 0

    def replace(self, value: Callable[[T], T]) -> None:
        """Replace each held sum by what `value` returns for it."""
        self.pending = [(node, value(held)) for node, held in self.pending]

    def take(self) -> T:
        """Return the sum over all virtual ranks, and start a new one."""
        (node, root), *others = self.pending
        assert not others, self.pending
        assert node == (0, self._count), node
        self.pending = []
        return root


def _are_siblings(left: Node, right: Node, count: int) -> bool:
    """Return whether the two nodes are the children of one node of the tree over `count`."""
    if left.stop != right.start or not _is_node(left.start, right.stop, count):
        return False
    return right.start - left.start == 1 << (right.stop - left.start - 1).bit_length() - 1


def _is_node(start: int, stop: int, count: int) -> bool:
    """Return whether the leaves from `start` to `stop` are those of one node.

    Complete nodes have a power of two of leaves, and start at a multiple of it. The nodes at the
    end of the tree may have fewer.
    """
    size = stop - start
    full = 1 << (size - 1).bit_length()
    return start % full == 0 and (size == full or stop == count)
