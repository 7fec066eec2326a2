"""The nodes of a cluster as a site profile describes them, and the plan of a run on them."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.environment.machine import Machine
from launcher.errors import SchedulerError, UsageError
from launcher.planning.loading import WORKERS_PER_RANK
from launcher.planning.plan import Plan
from launcher.planning.planner import CPU_RANKS
from launcher.recipe.overrides import read_arguments, read_yaml
from launcher.runs.plan_recipe import plan_recipe
from launcher.schedulers.request import SubmitRequest


@dataclass(frozen=True, kw_only=True)
class NodeHardware:
    """The resources of a node; None is unknown."""

    gpus: int | None
    """GPUs of a node; jobs that ask for more are refused."""

    cpus: int | None
    """Cores of a node; jobs that ask for more are refused."""

    memory_bytes: int | None
    """Memory of a node."""


def machine_of(hardware: NodeHardware, gpus: int, nproc: int) -> Machine:
    """Return the machine that a plan for the nodes of a cluster assumes.

    Args:
        hardware: The resources of a node.
        gpus: GPUs of each node that the job asks for.
        nproc: Ranks on each node.

    Raises:
        SchedulerError: A node has fewer GPUs.
    """
    if hardware.gpus is not None and gpus > hardware.gpus:
        advice = (
            "Ask for fewer, on more --nodes."
            if hardware.gpus
            else "Name a partition with GPUs in the site profile, or omit --gpus-per-node."
        )
        raise SchedulerError(
            f"--gpus-per-node {gpus} exceeds the {hardware.gpus} GPUs of a node. {advice}"
        )
    limit = "cores of a node" if hardware.cpus else "cores that the job asks for"
    return Machine(
        hostname="a node",
        num_gpus=gpus,
        usable_cores=hardware.cpus or nproc * (1 + WORKERS_PER_RANK),
        cores_limited_by=limit,
        memory_bytes=hardware.memory_bytes or 0,
        shm_bytes=0,
    )


def cpus_of(plan: Plan, hardware: NodeHardware) -> int:
    """Return the cores to ask for on each node: one for each rank and each DataLoader worker.

    Raises:
        SchedulerError: A node has fewer cores.
    """
    cpus = plan.nproc_per_node * (1 + plan.workers_per_rank)
    if hardware.cpus is not None and cpus > hardware.cpus:
        raise SchedulerError(
            f"{plan.nproc_per_node} ranks with {plan.workers_per_rank} workers each need {cpus} "
            f"cores, and a node has {hardware.cpus}. Lower num_workers."
        )
    return cpus


def memory_of(plan: Plan, hardware: NodeHardware, cpus: int) -> int | None:
    """Return the bytes to ask for on each node: the share of its GPUs or cores that is used."""
    memory = hardware.memory_bytes
    if memory is None:
        return None
    if plan.device == "cuda" and hardware.gpus:
        return memory * plan.nproc_per_node // hardware.gpus
    return memory * cpus // hardware.cpus if hardware.cpus else memory


def plan_runs(request: SubmitRequest, hardware: NodeHardware) -> tuple[Plan, ...]:
    """Return the plan of each run of a request.

    Raises:
        UsageError: The recipe, a setting or a number is wrong.
    """
    plans = tuple(_plan(request, hardware, arguments) for arguments in request.runs)
    if len({(plan.device, plan.nproc_per_node) for plan in plans}) > 1:
        raise UsageError(
            "The runs of an array must have the same number of ranks on the same device."
        )
    return plans


def _plan(request: SubmitRequest, hardware: NodeHardware, arguments: tuple[str, ...]) -> Plan:
    gpus = (hardware.gpus or 0) if request.gpus_per_node is None else request.gpus_per_node
    if request.gpus_per_node and request.nproc_per_node not in (None, gpus):
        raise UsageError(
            f"-n {request.nproc_per_node} contradicts --gpus-per-node {gpus}: each GPU has one "
            "rank. Give one of them."
        )
    overrides = (*(read_yaml(request.config) if request.config else ()), *read_arguments(arguments))
    ranks = request.nproc_per_node or gpus or CPU_RANKS
    machine = machine_of(hardware, min(ranks, gpus) if gpus else 0, ranks)
    _, plan = plan_recipe(
        request.reference,
        overrides,
        machine,
        nodes=request.nodes[1],
        nproc_per_node=request.nproc_per_node,
    )
    return plan
