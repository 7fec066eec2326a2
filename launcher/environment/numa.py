"""The NUMA nodes of this machine, and the CPUs near each GPU.

Every socket of a machine, and in some machines every part of one, has memory and PCIe slots of its
own. A rank that runs on the CPUs next to its GPU copies batches without a detour.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.recipe.text_values import digits


@dataclass(frozen=True, kw_only=True)
class CpuBinding:
    """The CPUs that a rank keeps to, or why it keeps to none."""

    numa_node: int | None = None
    """NUMA node of the rank's GPU; None if unknown or not asked for."""

    cpus: frozenset[int] = frozenset()
    """The CPUs of that node that the rank is bound to; empty if it is not bound."""

    reason: str = ""
    """Why the rank is not bound; empty if it is."""

    @property
    def is_refused(self) -> bool:
        """Whether the rank would have been bound if its CPUs were others."""
        return self.numa_node is not None and not self.cpus

    @property
    def text(self) -> str:
        """A clause about the rank: `bound to the CPUs 0-31 of NUMA node 0`."""
        if self.cpus:
            return f"bound to the CPUs {cpu_ranges(self.cpus)} of NUMA node {self.numa_node}"
        return f"not bound to a NUMA node: {self.reason}"


def read_numa_nodes(root: Path = Path("/")) -> dict[int, frozenset[int]]:
    """Return the CPUs of each NUMA node that has any, by the number of the node.

    Args:
        root: Root of the files of /sys that are read.
    """
    nodes = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        number = digits(folder.name.removeprefix("node"))
        cpus = _parse_ranges(_read(folder / "cpulist"))
        if number is not None and cpus:
            nodes[number] = cpus
    return dict(sorted(nodes.items()))


def numa_node_of(pci_address: str, root: Path = Path("/")) -> int | None:
    """Return the NUMA node of a device on the PCI bus; None if the firmware does not tell.

    Args:
        pci_address: Address of the device, such as `0000:3b:00.0`.
        root: Root of the files of /sys that are read.
    """
    return digits(_read(root / "sys/bus/pci/devices" / pci_address / "numa_node"))


def choose_cpus(
    own_node: int | None,
    nodes_of_ranks: Sequence[int | None],
    numa_nodes: Mapping[int, Collection[int]],
    allowed: Collection[int],
    *,
    workers_per_rank: int,
) -> CpuBinding:
    """Return the CPUs for a rank: those of its GPU's NUMA node that this process may use.

    Ranks whose GPUs are on one node share its CPUs, so that a busy rank can use what another one
    leaves. The rank is not bound where that would leave less than a CPU to each rank and each of
    its workers, unless they have no more without the binding.

    Args:
        own_node: NUMA node of the rank's GPU; None if unknown.
        nodes_of_ranks: The same for each rank on this machine.
        numa_nodes: The CPUs of each NUMA node.
        allowed: The CPUs that this process may use, by cgroups and by its affinity.
        workers_per_rank: DataLoader workers of each rank.
    """
    if len(numa_nodes) < 2:
        return CpuBinding(reason="the machine has one")
    if own_node is None or own_node not in numa_nodes:
        return CpuBinding(reason="that of the GPU is unknown")
    cpus = frozenset(numa_nodes[own_node]) & frozenset(allowed)
    near = cpu_ranges(numa_nodes[own_node])
    if not cpus:
        return CpuBinding(
            numa_node=own_node,
            reason=(
                f"this process may use the CPUs {cpu_ranges(allowed)}, and those of node "
                f"{own_node}, near the GPU, are {near}"
            ),
        )
    num_sharing = max(nodes_of_ranks.count(own_node), 1)
    needed = num_sharing * (1 + workers_per_rank)
    if len(cpus) < needed and len(cpus) * len(nodes_of_ranks) < len(allowed) * num_sharing:
        return CpuBinding(
            numa_node=own_node,
            reason=(
                f"of node {own_node}, near the GPU, this process may use {len(cpus)} CPUs, and "
                f"{num_sharing} ranks with {workers_per_rank} workers each would share them"
            ),
        )
    return CpuBinding(numa_node=own_node, cpus=cpus)


def cpu_ranges(cpus: Collection[int]) -> str:
    """Return numbers of CPUs as Linux writes them: `0-3,8`."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def _parse_ranges(text: str) -> frozenset[int]:
    """Return the numbers in a list such as `0-3,8`; none if it is not such a list."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        start, end = digits(first), digits(last or first)
        if start is None or end is None:
            return frozenset()
        cpus.update(range(start, end + 1))
    return frozenset(cpus)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
