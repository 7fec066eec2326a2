"""What more nodes would make of a step: a model of communication, of noise and of failures.

Collectives follow the alpha-beta model: a message of n bytes takes alpha + n / beta on a link
(Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005;
the double binary tree: Sanders, Speck, Traeff, "Two-tree algorithms for full bandwidth broadcast,
reduction and scan", 2009). What is left out: stragglers, contention with other jobs, kernels that
the communication slows down, a loader that cannot keep up, and the optimizer, which is taken to be
part of the computation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launcher.planning.strategy import STRATEGIES

_BUCKET_BYTES = 25 << 20
"""DDP's: the last bucket is ready when backward is over, and is never hidden."""

_BACKWARD = 2 / 3
"""Of a micro-step's time: backward computes two products for each of forward's."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A connection, in one direction."""

    seconds: float
    """Latency of a message (alpha)."""

    bytes_per_second: float
    """Bandwidth (beta)."""

    def send(self, num_bytes: float) -> float:
        """Return the seconds of a message."""
        return self.seconds + num_bytes / self.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class Network:
    """What ranks are connected by."""

    inside: Link
    """Between ranks of a node, for each of them."""

    between: Link
    """Between nodes, for all ranks of one together."""


class Bounds(NamedTuple):
    """Seconds: at best, where all that can be is hidden behind computation, and with nothing."""

    best: float
    worst: float


def ring(num_bytes: float, ranks: int, link: Link) -> float:
    """Return the seconds of an all-reduce in a ring: 2 (p - 1) messages of n / p bytes each."""
    return 2 * (ranks - 1) * link.send(num_bytes / ranks)


def tree(num_bytes: float, ranks: int, link: Link) -> float:
    """Return the seconds of an all-reduce in two binary trees: 2 log2(p) alpha + 2 n / beta."""
    if ranks == 1:
        return 0.0
    return 2 * math.log2(ranks) * link.seconds + 2 * num_bytes / link.bytes_per_second


def all_reduce(num_bytes: float, nodes: int, nproc: int, network: Network) -> float:
    """Return the seconds of an all-reduce over nodes x nproc ranks, in the fastest way.

    Within a node a ring. Over nodes: one ring through all ranks; or each node on its own, then
    the nodes, in a ring or in trees, of which each of a node's ranks carries its part.

    Args:
        num_bytes: What each rank has.
        nodes: Number of nodes.
        nproc: Ranks on each.
        network: Their connections.
    """
    own = ring(num_bytes, nproc, network.inside)
    if nodes == 1:
        return own
    flat = ring(num_bytes, nodes * nproc, network.between)
    among = min(way(num_bytes, nodes, network.between) for way in (ring, tree))
    return min(flat, own + among)


class Traffic(NamedTuple):
    """Seconds of a step's collectives, by what they can be hidden behind."""

    gradients: float
    """Reduced during backward."""

    reductions: int
    """Micro-steps whose gradients are reduced."""

    ahead: float = 0.0
    """Weights gathered before they are used, in forward and again in backward."""

    after: float = 0.0
    """Weights gathered when the step has been taken, with nothing to hide them."""

    @property
    def seconds(self) -> float:
        """All of it, one after the other."""
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
) -> Traffic:
    """Return the collectives of a step; a reduce-scatter or an all-gather is half an all-reduce.

    DDP reduces once a step. ZeRO 1 reduces once, ZeRO 2 after each micro-step, and both gather the
    weights after the step. ZeRO 3 and FSDP gather them for each forward and each backward, and
    reduce after it (Rajbhandari et al., arXiv:1910.02054, section 7).

    Args:
        num_bytes: Of the gradients, in fp32.
        nodes: Number of nodes.
        nproc: Ranks on each.
        network: Their connections.
        strategy: One of `launcher.planning.strategy.STRATEGIES`.
        accumulation: Micro-steps of a step.
        weight_size: Of a gathered weight over that of its gradient; FSDP in bf16 has 0.5.
    """
    whole = all_reduce(num_bytes, nodes, nproc, network)
    half = whole / 2
    sharding = STRATEGIES[strategy]
    if not sharding.shards:
        return Traffic(whole, 1)
    reductions = accumulation if sharding.shards_gradients else 1
    if not sharding.shards_parameters:
        return Traffic(reductions * half, reductions, after=half)
    gather = all_reduce(num_bytes * weight_size, nodes, nproc, network) / 2
    return Traffic(reductions * half, reductions, ahead=accumulation * 2 * gather)


def step_seconds(
    micro_seconds: float, sent: Traffic, *, accumulation: int, num_bytes: float
) -> Bounds:
    """Return the seconds of a step with its communication hidden as well as can be, and not at all.

    Gradients hide behind the backward that makes them, but for their last bucket; what is gathered
    ahead behind all of the computation.

    Args:
        micro_seconds: Computation of a micro-step.
        sent: The collectives of the step.
        accumulation: Its micro-steps.
        num_bytes: Of the gradients.
    """
    compute = accumulation * micro_seconds
    last_bucket = sent.gradients * min(_BUCKET_BYTES / num_bytes, 1.0) / sent.reductions
    behind = compute if sent.ahead else _BACKWARD * micro_seconds * sent.reductions
    shown = max(sent.gradients + sent.ahead - behind, last_bucket)
    return Bounds(compute + shown + sent.after, compute + sent.seconds)


class Computation:
    """Seconds of a micro-step by its size, from what was measured on one device.

    Between measured sizes straight lines; beyond the largest, samples at its rate; below the
    smallest, the line through the two smallest, which has what a step costs whatever its size, or
    with one size alone samples at its rate.

    Args:
        measured: (samples, seconds) of micro-steps, at least one.
    """

    def __init__(self, measured: Sequence[tuple[int, float]]) -> None:
        self._points = sorted(measured)

    @property
    def largest(self) -> int:
        """The largest size that was measured."""
        return self._points[-1][0]

    def seconds(self, size: float) -> float:
        """Return the seconds of a micro-step of so many samples."""
        points = self._points
        size_after, after = points[-1]
        if size >= size_after or len(points) == 1:
            return after * size / size_after
        above = next(index for index, (each, _) in enumerate(points) if size < each)
        (low, below), (high, above_seconds) = points[max(above - 1, 0)], points[max(above, 1)]
        slope = max((above_seconds - below) / (high - low), 0.0)
        return max(below + slope * (size - low), below * min(size / low, 1.0))


def checkpoint_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Return the seconds between checkpoints that lose the least: sqrt(2 C MTBF).

    Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974).
    """
    return math.sqrt(2 * save_seconds * mtbf_seconds)


def goodput(
    save_seconds: float, interval: float, restart_seconds: float, mtbf_seconds: float
) -> float:
    """Return the part of the time that is training which lasts, to first order; at least 0.

    Lost are the saving itself, and for each failure the start and half an interval of steps.
    """
    lost = save_seconds / interval + (restart_seconds + interval / 2) / mtbf_seconds
    return max(1 - lost, 0.0)
