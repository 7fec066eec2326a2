"""Bind a rank to the CPUs of its GPU's NUMA node.

torch's own binding (`torch.numa`, torch 2.13) needs the program numactl, takes the GPU whose index
is the local rank even where a rank sees only one, and takes an unknown NUMA node for node 0.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch._C._distributed_c10d import Store

from launcher.environment.numa import CpuBinding, choose_cpus, numa_node_of, read_numa_nodes
from launcher.environment.world import World

_TASKS = Path("/proc/self/task")


def bind_to_gpu(
    pci_address: str,
    world: World,
    store: Store | None,
    *,
    workers_per_rank: int,
    wanted: bool = True,
    root: Path = Path("/"),
) -> CpuBinding | None:
    """Bind this process to the CPUs near its GPU, if it has several NUMA nodes to choose from.

    The ranks of a node tell each other the NUMA nodes of their GPUs (collective on the node).
    DataLoader workers and threads that are started later inherit the binding.

    Args:
        pci_address: Address of the GPU on the PCI bus.
        world: This rank.
        store: The store at which the ranks have met; None if this rank is alone.
        workers_per_rank: DataLoader workers of each rank.
        wanted: Whether to bind this process. If not, it only tells the others about its GPU.
        root: Root of the files of /sys that are read.

    Returns:
        The CPUs, or why the process is not bound; None if that was not wanted.
    """
    own_node = numa_node_of(pci_address, root)
    if store is not None:
        store.set(f"numa/{world.rank}", "" if own_node is None else str(own_node))
    if not wanted:
        return None
    nodes = [own_node] if store is None else _nodes_of_ranks(store, world)
    allowed = allowed_cpus()
    numa_nodes = read_numa_nodes(root)
    binding = choose_cpus(own_node, nodes, numa_nodes, allowed, workers_per_rank=workers_per_rank)
    if binding.cpus:
        try:
            keep_to_cpus(binding.cpus)
        except OSError as error:
            return CpuBinding(numa_node=own_node, reason=f"the kernel refuses: {error.strerror}")
    return binding


def pci_address_of(device: torch.device) -> str:
    """Return the address of a GPU on the PCI bus, as in /sys/bus/pci/devices."""
    properties = torch.cuda.get_device_properties(device)
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    domain, bus, slot = (getattr(properties, name, 0) for name in names)
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"


def allowed_cpus() -> frozenset[int]:
    """Return the CPUs that this process may use; none where the system does not tell."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def keep_to_cpus(cpus: Collection[int]) -> None:
    """Bind every thread of this process to some CPUs, except threads that are bound to others.

    Raises:
        OSError: The kernel refuses.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    for task in _TASKS.iterdir():
        thread = int(task.name)
        with contextlib.suppress(OSError):  # the thread has ended
            if os.sched_getaffinity(thread) == before:
                os.sched_setaffinity(thread, cpus)


def _nodes_of_ranks(store: Store, world: World) -> list[int | None]:
    """Return the NUMA node of the GPU of each rank on this machine."""
    first = world.rank - world.local_rank
    found = [store.get(f"numa/{first + rank}").decode() for rank in range(world.local_world_size)]
    return [int(node) if node else None for node in found]
