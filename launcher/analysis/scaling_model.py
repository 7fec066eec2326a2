"""A model of a training step on more ranks and nodes, and of the cost of failures.

StepCollectives follow the alpha-beta model: a message of n bytes takes alpha + n / beta on a link
(Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005;
the double binary tree: Sanders, Speck, Traeff, "Two-tree algorithms for full bandwidth broadcast,
reduction and scan", 2009). The model ignores stragglers, contention with other jobs, kernels that
communication slows down, and data loading that cannot keep up. It counts the optimizer as
computation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launcher.planning.fsdp_messages import StepCollectives
from launcher.planning.sharding import Sharding
from launcher.planning.strategy import STRATEGIES

_BUCKET_BYTES = 25 << 20
"""Size of DDP's gradient buckets; the last one is ready when backward ends and overlaps nothing."""

_BACKWARD_FRACTION = 2 / 3
"""Fraction of a micro-step spent in backward, which computes two products for each of forward's."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A connection between two endpoints, in one direction."""

    seconds: float
    """Latency of a message (alpha), in seconds."""

    bytes_per_second: float
    """Bandwidth (beta), in bytes per second."""

    def send(self, num_bytes: float) -> float:
        """Return the seconds that a message of `num_bytes` takes."""
        return self.seconds + num_bytes / self.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class Network:
    """The links between the ranks of a cluster."""

    inside: Link
    """Link of each rank to the other ranks of its node."""

    between: Link
    """Link of a node to the other nodes, shared by all of its ranks."""


class Bounds(NamedTuple):
    """The best and the worst case of a quantity."""

    best: float
    """The value if communication overlaps with computation wherever it can."""

    worst: float
    """The value if communication never overlaps with computation."""


def ring(num_bytes: float, ranks: int, link: Link) -> float:
    """Return the seconds of a ring all-reduce: 2 (p - 1) messages of n / p bytes each.

    Args:
        num_bytes: Size n of the buffer of each rank.
        ranks: Number p of ranks.
        link: Link between neighbours in the ring.
    """
    return 2 * (ranks - 1) * link.send(num_bytes / ranks)


def tree(num_bytes: float, ranks: int, link: Link) -> float:
    """Return the seconds of a double-binary-tree all-reduce: 2 log2(p) alpha + 2 n / beta.

    Args:
        num_bytes: Size n of the buffer of each rank.
        ranks: Number p of ranks.
        link: Link between neighbours in the trees.
    """
    if ranks == 1:
        return 0.0
    return 2 * math.log2(ranks) * link.seconds + 2 * num_bytes / link.bytes_per_second


def all_reduce(num_bytes: float, nodes: int, nproc: int, network: Network) -> float:
    """Return the seconds of an all-reduce over nodes x nproc ranks by the fastest algorithm.

    Ranks of one node form a ring. Across nodes there are two candidates: one ring through all
    ranks, or a hierarchy in which each node reduces on its own and the nodes then reduce in a ring
    or in trees, with each rank of a node carrying its part.

    Args:
        num_bytes: Size of the buffer of each rank.
        nodes: Number of nodes.
        nproc: Ranks per node.
        network: Links within and between nodes.
    """
    within_node = ring(num_bytes, nproc, network.inside)
    if nodes == 1:
        return within_node
    flat = ring(num_bytes, nodes * nproc, network.between)
    between_nodes = min(algorithm(num_bytes, nodes, network.between) for algorithm in (ring, tree))
    return min(flat, within_node + between_nodes)


class Traffic(NamedTuple):
    """The time of the collectives of a step, by the computation that they can overlap with."""

    gradients: float
    """Seconds of the gradient reductions, which overlap with backward."""

    reductions: int
    """Number of micro-steps whose gradients are reduced."""

    ahead: float = 0.0
    """Seconds of gathering weights before forward and backward use them."""

    after: float = 0.0
    """Seconds of gathering weights after the optimizer step, which overlap with nothing."""

    @property
    def seconds(self) -> float:
        """Seconds of all collectives, one after the other."""
        return self.gradients + self.ahead + self.after


def traffic(
    num_bytes: float,
    nodes: int,
    nproc: int,
    network: Network,
    *,
    strategy: str,
    accumulation: int,
    weight_size: float = 1.0,
    sharding: Sharding | None = None,
    collectives: StepCollectives | None = None,
) -> Traffic:
    """Return the time of the collectives of one step under a strategy.

    A reduce-scatter or an all-gather counts as half an all-reduce. DDP reduces once per step.
    ZeRO 1 reduces once and ZeRO 2 after each micro-step, and both gather the weights after the
    step. ZeRO 3 and FSDP gather the weights for each forward and each backward, and reduce after
    each backward (Rajbhandari et al., arXiv:1910.02054, section 7).

    Args:
        num_bytes: Size of the fp32 gradients.
        nodes: Number of nodes.
        nproc: Ranks per node.
        network: Links within and between nodes.
        strategy: One of `launcher.planning.strategy.STRATEGIES`.
        accumulation: Micro-steps per step.
        weight_size: Size of a gathered weight over that of its gradient, such as 0.5 for FSDP in
            bf16.
        sharding: The groups of ranks of FSDP, which then have these `collectives`.
        collectives: The collectives of a step under FSDP; None if `sharding` is None.
    """
    if sharding is not None and collectives is not None:
        return _fsdp_traffic(num_bytes, network, sharding, collectives)
    full = all_reduce(num_bytes, nodes, nproc, network)
    half = full / 2
    kind = STRATEGIES[strategy]
    if not kind.shards:
        return Traffic(full, 1)
    reductions = accumulation if kind.shards_gradients else 1
    if not kind.shards_parameters:
        return Traffic(reductions * half, reductions, after=half)
    gather = all_reduce(num_bytes * weight_size, nodes, nproc, network) / 2
    return Traffic(reductions * half, reductions, ahead=accumulation * 2 * gather)


def _fsdp_traffic(
    num_bytes: float, network: Network, sharding: Sharding, collectives: StepCollectives
) -> Traffic:
    """Return the time of FSDP's collectives, in groups of ranks that each hold all weights.

    Args:
        num_bytes: Size of all weights in fp32.
        network: Links within and between nodes.
        sharding: The groups.
        collectives: The collectives of a step.
    """
    size, nproc = sharding.size, sharding.nproc_per_node
    nodes_of_group, ranks_of_node = max(size // nproc, 1), min(size, nproc)

    def in_group(num_bytes: float) -> float:
        return all_reduce(num_bytes, nodes_of_group, ranks_of_node, network) / 2

    gather = in_group(num_bytes * collectives.gathered_size)
    reduced = num_bytes * collectives.reduced_size
    reduce = in_group(reduced)
    if size >= nproc:  # the ranks of a node share its link for their sums over the copies
        copies = all_reduce(reduced / nodes_of_group, sharding.nodes // nodes_of_group, 1, network)
    else:
        within = ring(reduced / size, nproc // size, network.inside)
        copies = within + all_reduce(reduced, sharding.nodes, 1, network)
    return Traffic(
        collectives.reductions * reduce + collectives.sums * copies,
        collectives.reductions,
        ahead=collectives.gathers * gather,
    )


def step_seconds(
    micro_seconds: float, sent: Traffic, *, accumulation: int, num_bytes: float
) -> Bounds:
    """Return the seconds of a step, with the most and with no overlap of communication.

    At best, gradients overlap with the backward that produces them, except for their last bucket,
    and gathering ahead overlaps with all computation.

    Args:
        micro_seconds: Computation of one micro-step, in seconds.
        sent: StepCollectives of the step.
        accumulation: Micro-steps per step.
        num_bytes: Size of the gradients.
    """
    compute = accumulation * micro_seconds
    last_bucket = sent.gradients * min(_BUCKET_BYTES / num_bytes, 1.0) / sent.reductions
    overlap = compute if sent.ahead else _BACKWARD_FRACTION * micro_seconds * sent.reductions
    exposed = max(sent.gradients + sent.ahead - overlap, last_bucket)
    return Bounds(compute + exposed + sent.after, compute + sent.seconds)


class Computation:
    """The time of a micro-step as a function of its size, measured on one device.

    The time is interpolated linearly between measured sizes. Above the largest, the throughput of
    the largest applies. Below the smallest, the line through the two smallest is continued, which
    includes the fixed cost of a micro-step; with one size alone its throughput applies.

    Args:
        measured: (samples, seconds) of micro-steps, at least one.
    """

    def __init__(self, measured: Sequence[tuple[int, float]]) -> None:
        self._points = sorted(measured)

    @property
    def largest(self) -> int:
        """The largest measured size, in samples."""
        return self._points[-1][0]

    def seconds(self, size: float) -> float:
        """Return the seconds of a micro-step of `size` samples."""
        points = self._points
        largest, largest_seconds = points[-1]
        if size >= largest or len(points) == 1:
            return largest_seconds * size / largest
        above = next(index for index, (measured, _) in enumerate(points) if size < measured)
        (low, low_seconds), (high, high_seconds) = points[max(above - 1, 0)], points[max(above, 1)]
        slope = max((high_seconds - low_seconds) / (high - low), 0.0)
        # A steep line must not promise small sizes a higher throughput than any measured one.
        return max(low_seconds + slope * (size - low), low_seconds * min(size / low, 1.0))


def checkpoint_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Return the seconds between checkpoints that lose the least time: sqrt(2 C MTBF).

    Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974).

    Args:
        save_seconds: Time C that a checkpoint takes.
        mtbf_seconds: Mean time between failures of the whole job.
    """
    return math.sqrt(2 * save_seconds * mtbf_seconds)


def goodput(
    save_seconds: float, interval: float, restart_seconds: float, mtbf_seconds: float
) -> float:
    """Return the fraction of the time spent on steps that last, to first order; at least 0.

    Time is lost to saving, and at each failure to the restart and to half an interval of steps on
    average.

    Args:
        save_seconds: Time that a checkpoint takes.
        interval: Time between checkpoints, in seconds.
        restart_seconds: Time from a failure to the next step.
        mtbf_seconds: Mean time between failures of the whole job.
    """
    lost = save_seconds / interval + (restart_seconds + interval / 2) / mtbf_seconds
    return max(1 - lost, 0.0)
