"""What a run would take on more ranks, from what was measured on one: a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from launcher.analysis.scaling_model import (
    Bounds,
    Computation,
    Link,
    Network,
    checkpoint_interval,
    goodput,
    step_seconds,
    traffic,
)
from launcher.errors import PlanError
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.slurm.site import Site
from launcher.tuning.measurements import Measurements

GRADIENT_BYTES = 4
"""Of a weight: gradients are summed in fp32."""


@dataclass(frozen=True, kw_only=True)
class EstimateInputs:
    """What is true of a cluster, whatever runs on it."""

    network: Network
    mtbf_seconds: float
    """Mean time between failures that end a run, for each device."""

    restart_seconds: float
    """From a failure to the first step again."""

    price_per_hour: float | None
    """Of a device."""


ON_GPUS = EstimateInputs(
    network=Network(
        inside=Link(seconds=10e-6, bytes_per_second=200e9),
        between=Link(seconds=20e-6, bytes_per_second=200e9 / 8),
    ),
    mtbf_seconds=50_000 * 3600.0,
    restart_seconds=300.0,
    price_per_hour=None,
)
"""Where nothing is said: NVLink as NCCL uses it, 200 Gbit/s between nodes, and a failure for each
50,000 hours of a GPU: 419 in 54 days of 16,384 ("The Llama 3 Herd of Models", arXiv:2407.21783)."""

ON_CPUS = replace(
    ON_GPUS,
    network=Network(
        inside=Link(seconds=100e-6, bytes_per_second=1e9),
        between=Link(seconds=100e-6, bytes_per_second=10e9 / 8),
    ),
)
"""Where nothing is said: gloo over loopback, and 10 Gbit/s between nodes."""


def facts_of(site: Site, device: str) -> EstimateInputs:
    """Return what a site profile says of its links, failures and prices, or what is assumed."""
    assumed = ON_GPUS if device == "cuda" else ON_CPUS
    inside, between = assumed.network.inside, assumed.network.between

    def link(known: Link, microseconds: float | None, num_bytes: float | None) -> Link:
        return Link(
            seconds=known.seconds if microseconds is None else microseconds / 1e6,
            bytes_per_second=num_bytes or known.bytes_per_second,
        )

    return EstimateInputs(
        network=Network(
            inside=link(inside, site.link_microseconds, (site.link_gigabytes or 0) * 1e9),
            between=link(
                between, site.network_microseconds, (site.network_gigabits or 0) * 1e9 / 8
            ),
        ),
        mtbf_seconds=(site.mtbf_hours or 0) * 3600 or assumed.mtbf_seconds,
        restart_seconds=site.restart_seconds or assumed.restart_seconds,
        price_per_hour=site.price_per_hour,
    )


@dataclass(frozen=True, kw_only=True)
class EstimateRow:
    """A run on one number of ranks; a span is with all communication hidden that can be, and none.

    A device is a GPU; on CPUs it is a node, whose ranks share its cores.
    """

    nodes: int
    nproc_per_node: int
    batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    seconds_per_step: Bounds
    samples_per_second: Bounds
    efficiency: Bounds
    """Samples/s of each device, over those of one alone."""

    seconds: Bounds
    """Of the whole run, with what failures cost."""

    device_hours: Bounds
    price: Bounds | None
    samples_ratio: float | None
    """Samples to the same loss over those at a tiny batch: 1 + B / B_simple."""

    save_every: float | None
    """Seconds between checkpoints that lose the least."""

    goodput: float
    """The part of the time that is training which lasts."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The table, and how it ends."""

    measured: Measurements
    facts: EstimateInputs
    rows: tuple[EstimateRow, ...]
    refusal: str | None
    """Why there is no row for more ranks, if that is so."""


def estimate_scaling(
    plan_for: Callable[[int, int], Plan],
    nodes: int,
    nproc: int,
    measured: Measurements,
    facts: EstimateInputs,
) -> Estimate:
    """Return what the run would take on one rank, on more of one node, and on more nodes.

    Args:
        plan_for: Plans the run for nodes x ranks on each.
        nodes: The most nodes.
        nproc: The most ranks on each.
        measured: On one device.
        facts: Of the cluster.
    """
    rows: list[EstimateRow] = []
    refusal = None
    for some_nodes, some_nproc in _worlds(nodes, nproc):
        try:
            plan = plan_for(some_nodes, some_nproc)
        except PlanError as error:
            if not rows:  # it may need several ranks
                continue
            refusal = f"{some_nodes} x {some_nproc}: {error}"
            break
        rows.append(_row(plan, measured, facts))
    return Estimate(measured=measured, facts=facts, rows=tuple(rows), refusal=refusal)


def _worlds(nodes: int, nproc: int) -> Iterator[tuple[int, int]]:
    """Yield (nodes, ranks on each): doubled up to a whole node, then doubled nodes."""
    yield from ((1, each) for each in _doubled(nproc))
    yield from ((each, nproc) for each in _doubled(nodes) if each > 1)


def _doubled(most: int) -> Iterator[int]:
    number = 1
    while number < most:
        yield number
        number *= 2
    yield most


def _row(plan: Plan, measured: Measurements, facts: EstimateInputs) -> EstimateRow:
    nodes, nproc, accumulation = plan.nodes, plan.nproc_per_node, plan.accumulation_steps
    compute = Computation(measured.micro_steps)
    devices = plan.world_size if plan.device == "cuda" else nodes
    sharing = plan.world_size / devices  # what one rank alone computed with, these have together
    num_bytes = measured.num_trained * GRADIENT_BYTES
    half_weights = STRATEGIES[plan.strategy].gathers_parameters_in_autocast_dtype
    sent = traffic(
        num_bytes,
        nodes,
        nproc,
        facts.network,
        strategy=plan.strategy,
        accumulation=accumulation,
        weight_size=0.5 if half_weights and plan.precision in ("bf16", "fp16") else 1.0,
    )
    share = plan.batch_size / plan.world_size / accumulation
    micro_seconds = compute.seconds(share) * sharing
    step = step_seconds(micro_seconds, sent, accumulation=accumulation, num_bytes=num_bytes)
    alone = compute.largest / compute.seconds(compute.largest)
    speed = Bounds(*(plan.batch_size / each for each in step))
    save_every, kept = _failures(measured.save_seconds, facts, devices)
    seconds = Bounds(*(plan.total_steps * each / max(kept, 1e-9) for each in step))
    hours = Bounds(*(each / 3600 * devices for each in seconds))
    price, noise = facts.price_per_hour, measured.noise_scale
    return EstimateRow(
        nodes=nodes,
        nproc_per_node=nproc,
        batch_size=plan.batch_size,
        micro_batch_size=plan.micro_batch_size,
        accumulation_steps=accumulation,
        seconds_per_step=step,
        samples_per_second=speed,
        efficiency=Bounds(*(each / devices / alone for each in speed)),
        seconds=seconds,
        device_hours=hours,
        price=None if price is None else Bounds(*(each * price for each in hours)),
        samples_ratio=None if noise is None else 1 + plan.batch_size / noise,
        save_every=save_every,
        goodput=kept,
    )


def _failures(
    save: float | None, facts: EstimateInputs, devices: int
) -> tuple[float | None, float]:
    """Return the seconds between checkpoints, and the part of the time that lasts."""
    mtbf = facts.mtbf_seconds / devices
    if not save:
        return None, 1.0
    every = checkpoint_interval(save, mtbf)
    return every, goodput(save, every, facts.restart_seconds, mtbf)
