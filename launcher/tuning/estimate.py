"""Estimates of a run on more ranks and nodes, from measurements on one device."""

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
from launcher.planning.fsdp_messages import collectives_for
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.recipe.max_time import seconds_in
from launcher.slurm.site import Site
from launcher.tuning.measurements import Measurements

GRADIENT_BYTES = 4
"""Bytes of a weight's gradient: gradients are reduced in fp32."""


@dataclass(frozen=True, kw_only=True)
class EstimateInputs:
    """The properties of a cluster that an estimate depends on."""

    network: Network
    """Links within and between nodes."""

    mtbf_seconds: float
    """Mean time between failures of one device that end a run."""

    restart_seconds: float
    """Time from a failure to the next step."""

    price_per_hour: float | None
    """Price of a device for one hour; None if it is unknown."""


ON_GPUS = EstimateInputs(
    network=Network(
        inside=Link(seconds=10e-6, bytes_per_second=200e9),
        between=Link(seconds=20e-6, bytes_per_second=200e9 / 8),
    ),
    mtbf_seconds=50_000 * 3600.0,
    restart_seconds=300.0,
    price_per_hour=None,
)
"""Defaults for GPUs: NVLink as NCCL uses it, 200 Gbit/s between nodes, and a failure per 50,000
GPU hours: 419 in 54 days of 16,384 GPUs ("The Llama 3 Herd of Models", arXiv:2407.21783)."""

ON_CPUS = replace(
    ON_GPUS,
    network=Network(
        inside=Link(seconds=100e-6, bytes_per_second=1e9),
        between=Link(seconds=100e-6, bytes_per_second=10e9 / 8),
    ),
)
"""Defaults for CPUs: gloo over loopback, and 10 Gbit/s between nodes."""


def estimate_inputs(site: Site, device: str) -> EstimateInputs:
    """Return the properties in a site profile, with defaults for those that it does not state.

    Args:
        site: The site profile.
        device: "cuda" or "cpu", which selects the defaults.
    """
    defaults = ON_GPUS if device == "cuda" else ON_CPUS

    def link(default: Link, microseconds: float | None, bytes_per_second: float | None) -> Link:
        return Link(
            seconds=default.seconds if microseconds is None else microseconds / 1e6,
            bytes_per_second=bytes_per_second or default.bytes_per_second,
        )

    return EstimateInputs(
        network=Network(
            inside=link(
                defaults.network.inside, site.link_microseconds, (site.link_gigabytes or 0) * 1e9
            ),
            between=link(
                defaults.network.between,
                site.network_microseconds,
                (site.network_gigabits or 0) * 1e9 / 8,
            ),
        ),
        mtbf_seconds=(site.mtbf_hours or 0) * 3600 or defaults.mtbf_seconds,
        restart_seconds=site.restart_seconds or defaults.restart_seconds,
        price_per_hour=site.price_per_hour,
    )


@dataclass(frozen=True, kw_only=True)
class EstimateRow:
    """The estimate for one number of ranks, as bounds where communication may overlap.

    A device is a GPU. On CPUs it is a node, whose ranks share its cores.
    """

    nodes: int
    """Number of nodes."""

    nproc_per_node: int
    """Ranks per node."""

    batch_size: int
    """Global batch, in samples."""

    micro_batch_size: int
    """Largest micro-batch, in samples."""

    accumulation_steps: int
    """Micro-steps per step."""

    seconds_per_step: Bounds
    """Seconds per step."""

    samples_per_second: Bounds
    """Throughput of all ranks together."""

    efficiency: Bounds
    """Throughput per device over the throughput of one device alone."""

    seconds: Bounds
    """Duration of the whole run, including the cost of failures; at most `max_time`."""

    steps: Bounds | None
    """Steps of the run that fit in `max_time`; None without it."""

    device_hours: Bounds
    """Hours of all devices together."""

    price: Bounds | None
    """Price of those hours; None if the price of a device is unknown."""

    samples_ratio: float | None
    """Samples to a loss over those with a tiny batch, 1 + B / B_simple; None if not measured."""

    save_every: float | None
    """Seconds between checkpoints that lose the least time; None if saving was not measured."""

    goodput: float
    """Fraction of the time spent on steps that last."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimates for growing numbers of ranks, with their inputs."""

    measured: Measurements
    """Measurements on one device."""

    facts: EstimateInputs
    """Properties of the cluster."""

    rows: tuple[EstimateRow, ...]
    """One estimate per number of ranks, in ascending order."""

    refusal: str | None
    """Why the run cannot use more ranks; None if all numbers of ranks have a row."""


def estimate_scaling(
    plan_for: Callable[[int, int], Plan],
    nodes: int,
    nproc: int,
    measured: Measurements,
    facts: EstimateInputs,
) -> Estimate:
    """Estimate the run on one rank, on more ranks of one node, and on more nodes.

    Args:
        plan_for: Returns the plan for a number of nodes and of ranks per node.
        nodes: Largest number of nodes.
        nproc: Largest number of ranks per node.
        measured: Measurements on one device.
        facts: Properties of the cluster.

    Raises:
        PlanError: The plans have tensor-parallel groups.
    """
    rows: list[EstimateRow] = []
    refusal = None
    for num_nodes, nproc_per_node in _worlds(nodes, nproc):
        try:
            plan = plan_for(num_nodes, nproc_per_node)
        except PlanError as error:
            if not rows:  # the run may need several ranks
                continue
            refusal = f"{num_nodes} x {nproc_per_node}: {error}"
            break
        _refuse_tensor_parallel(plan)
        rows.append(_row(plan, measured, facts))
    return Estimate(measured=measured, facts=facts, rows=tuple(rows), refusal=refusal)


def _refuse_tensor_parallel(plan: Plan) -> None:
    """Refuse to estimate a run whose ranks exchange activations, which nothing has measured.

    Raises:
        PlanError: The plan has tensor-parallel groups.
    """
    if plan.tensor_parallel > 1:
        raise PlanError(
            f"An estimate follows from steps of one rank, and with "
            f"tensor_parallel={plan.tensor_parallel} the ranks of a group exchange activations in "
            "every layer, which it does not know. Estimate without tensor_parallel, or measure a "
            "short run with `launcher run ... steps=50`."
        )


def _worlds(nodes: int, nproc: int) -> Iterator[tuple[int, int]]:
    """Yield (nodes, ranks per node): ranks double up to a full node, then nodes double."""
    yield from ((1, nproc_per_node) for nproc_per_node in _doubled(nproc))
    yield from ((num_nodes, nproc) for num_nodes in _doubled(nodes) if num_nodes > 1)


def _doubled(limit: int) -> Iterator[int]:
    """Yield the powers of two below `limit`, and `limit`."""
    number = 1
    while number < limit:
        yield number
        number *= 2
    yield limit


def _row(plan: Plan, measured: Measurements, facts: EstimateInputs) -> EstimateRow:
    nodes, nproc, accumulation = plan.nodes, plan.nproc_per_node, plan.accumulation_steps
    compute = Computation(measured.micro_steps)
    num_devices = plan.world_size if plan.device == "cuda" else nodes
    # Ranks of a CPU node share the cores that one rank had alone in the measurement.
    ranks_per_device = plan.world_size / num_devices
    num_bytes = measured.num_trained * GRADIENT_BYTES
    half_weights = STRATEGIES[plan.strategy].gathers_parameters_in_autocast_dtype
    collectives = traffic(
        num_bytes,
        nodes,
        nproc,
        facts.network,
        strategy=plan.strategy,
        accumulation=accumulation,
        weight_size=0.5 if half_weights and plan.precision in ("bf16", "fp16") else 1.0,
        sharding=plan.sharding,
        collectives=(
            None
            if plan.sharding is None
            else collectives_for(plan.settings, accumulation, plan.distribution.rounds)
        ),
    )
    micro_batch = plan.batch_size / plan.world_size / accumulation
    micro_seconds = compute.seconds(micro_batch) * ranks_per_device
    step = step_seconds(micro_seconds, collectives, accumulation=accumulation, num_bytes=num_bytes)
    rate_alone = compute.largest / compute.seconds(compute.largest)
    rate = Bounds(*(plan.batch_size / seconds for seconds in step))
    save_every, lasting = _failures(measured.save_seconds, facts, num_devices)
    duration = Bounds(*(plan.total_steps * seconds / max(lasting, 1e-9) for seconds in step))
    steps, max_time = None, plan.settings["max_time"]
    if max_time is not None:
        given = seconds_in(max_time)
        parts = [min(given / seconds, 1.0) for seconds in duration]
        steps = Bounds(*(int(part * plan.total_steps) for part in parts))
        duration = Bounds(*(min(given, seconds) for seconds in duration))
    hours = Bounds(*(seconds / 3600 * num_devices for seconds in duration))
    price, critical = facts.price_per_hour, measured.critical_batch
    return EstimateRow(
        nodes=nodes,
        nproc_per_node=nproc,
        batch_size=plan.batch_size,
        micro_batch_size=plan.micro_batch_size,
        accumulation_steps=accumulation,
        seconds_per_step=step,
        samples_per_second=rate,
        efficiency=Bounds(*(bound / num_devices / rate_alone for bound in rate)),
        seconds=duration,
        steps=steps,
        device_hours=hours,
        price=None if price is None else Bounds(*(bound * price for bound in hours)),
        samples_ratio=None if critical is None else 1 + plan.batch_size / critical,
        save_every=save_every,
        goodput=lasting,
    )


def _failures(
    save_seconds: float | None, facts: EstimateInputs, num_devices: int
) -> tuple[float | None, float]:
    """Return the seconds between checkpoints and the goodput; (None, 1) if saving is unknown."""
    if not save_seconds:
        return None, 1.0
    mtbf = facts.mtbf_seconds / num_devices
    interval = checkpoint_interval(save_seconds, mtbf)
    return interval, goodput(save_seconds, interval, facts.restart_seconds, mtbf)
