"""From a plan and a site to what is asked of Slurm; what cannot be is refused here."""

from __future__ import annotations

from launcher.environment.machine import Machine
from launcher.errors import SlurmError
from launcher.planning.loading import WORKERS_PER_RANK
from launcher.planning.plan import Plan
from launcher.slurm.site import Site, read_memory, read_time


def machine_of(site: Site, gpus: int, nproc: int) -> Machine:
    """Return a node as the plan for it sees it.

    Args:
        site: Where.
        gpus: Of a node, to ask for.
        nproc: Ranks on a node.

    Raises:
        SlurmError: There are fewer GPUs.
    """
    if site.gpus_per_node is not None and gpus > site.gpus_per_node:
        raise SlurmError(
            f"--gpus-per-node {gpus} was asked for, and a node has {site.gpus_per_node}. "
            "Ask for fewer, on more --nodes."
        )
    cores = site.cpus_per_node or nproc * (1 + WORKERS_PER_RANK)
    limit = "cores of a node" if site.cpus_per_node else "cores to be asked for"
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
    """Return the cores to ask for on each node: one for each rank and each of its workers.

    Raises:
        SlurmError: A node has fewer.
    """
    cpus = plan.nproc_per_node * (1 + plan.workers_per_rank)
    if site.cpus_per_node is not None and cpus > site.cpus_per_node:
        raise SlurmError(
            f"{plan.nproc_per_node} ranks with {plan.workers_per_rank} workers each need {cpus} "
            f"cores, and a node has {site.cpus_per_node}. Set num_workers lower."
        )
    return cpus


def memory_of(plan: Plan, site: Site, cpus: int) -> int | None:
    """Return the MiB to ask for on each node, in the proportion in which its devices are used."""
    if site.memory_per_node is None:
        return None
    whole = read_memory(site.memory_per_node, "memory_per_node")
    if plan.device == "cuda" and site.gpus_per_node:
        return whole * plan.nproc_per_node // site.gpus_per_node
    return whole * cpus // site.cpus_per_node if site.cpus_per_node else whole


def seconds_of(time: str | None, site: Site) -> int | None:
    """Return the time limit.

    Raises:
        SlurmError: It is no time, or over the site's.
    """
    asked = time or site.time
    if asked is None:
        return None
    seconds = read_time(asked, "--time" if time else "time")
    if site.max_time is not None and seconds > read_time(site.max_time, "max_time"):
        raise SlurmError(
            f"--time {asked} was asked for, and a job may take {site.max_time}. Ask for "
            "less: a job that reaches its time saves, is queued again and goes on."
        )
    if seconds <= site.warning_seconds:
        raise SlurmError(
            f"--time {asked} is no more than the {site.warning_seconds} s before its end at which "
            "a job is told to save: ask for more, or set warning_seconds in the profile."
        )
    return seconds
