"""The resources that a job asks Slurm for, from a plan and a site profile."""

from __future__ import annotations

from launcher.environment.machine import Machine
from launcher.errors import SlurmError
from launcher.planning.loading import WORKERS_PER_RANK
from launcher.planning.plan import Plan
from launcher.slurm.site import Site, read_memory, read_time


def machine_of(site: Site, gpus: int, nproc: int) -> Machine:
    """Return the machine that a plan for the nodes of a site assumes.

    Args:
        site: The site profile.
        gpus: GPUs of each node that the job asks for.
        nproc: Ranks on each node.

    Raises:
        SlurmError: A node of the site has fewer GPUs.
    """
    if site.gpus_per_node is not None and gpus > site.gpus_per_node:
        advice = (
            "Ask for fewer, on more --nodes."
            if site.gpus_per_node
            else "Name a partition with GPUs in the site profile, or omit --gpus-per-node."
        )
        raise SlurmError(
            f"--gpus-per-node {gpus} exceeds the {site.gpus_per_node} GPUs of a node. {advice}"
        )
    cores = site.cpus_per_node or nproc * (1 + WORKERS_PER_RANK)
    limit = "cores of a node" if site.cpus_per_node else "cores that the job asks for"
    memory = read_memory(site.memory_per_node, "memory_per_node") if site.memory_per_node else 0
    return Machine(
        hostname="a node",
        num_gpus=gpus,
        usable_cores=cores,
        cores_limited_by=limit,
        memory_bytes=memory * 2**20,
        shm_bytes=0,
    )


def cpus_of(plan: Plan, site: Site) -> int:
    """Return the cores to ask for on each node: one for each rank and each DataLoader worker.

    Raises:
        SlurmError: A node of the site has fewer cores.
    """
    cpus = plan.nproc_per_node * (1 + plan.workers_per_rank)
    if site.cpus_per_node is not None and cpus > site.cpus_per_node:
        raise SlurmError(
            f"{plan.nproc_per_node} ranks with {plan.workers_per_rank} workers each need {cpus} "
            f"cores, and a node has {site.cpus_per_node}. Lower num_workers."
        )
    return cpus


def memory_of(plan: Plan, site: Site, cpus: int) -> int | None:
    """Return the MiB to ask for on each node: the share of its GPUs or cores that is used."""
    if site.memory_per_node is None:
        return None
    memory = read_memory(site.memory_per_node, "memory_per_node")
    if plan.device == "cuda" and site.gpus_per_node:
        return memory * plan.nproc_per_node // site.gpus_per_node
    return memory * cpus // site.cpus_per_node if site.cpus_per_node else memory


def seconds_of(time: str | None, site: Site) -> int | None:
    """Return the time limit of a job in seconds; None leaves it to Slurm.

    Raises:
        SlurmError: The time is malformed, exceeds the limit of the site, or is too short to save.
    """
    limit = time or site.time
    if limit is None:
        return None
    source = "--time" if time else "time"
    seconds = read_time(limit, source)
    if site.max_time is not None and seconds > read_time(site.max_time, "max_time"):
        raise SlurmError(
            f"{source} {limit} exceeds the longest time of the site, {site.max_time}. Ask for "
            "less: a job that reaches its time limit saves a checkpoint, is requeued and resumes."
        )
    if seconds <= site.warning_seconds:
        raise SlurmError(
            f"{source} {limit} leaves no time to train: a job is told to save "
            f"{site.warning_seconds} s before its end. Ask for more, or lower warning_seconds in "
            "the site profile."
        )
    return seconds
