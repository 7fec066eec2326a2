"""Partitions: which nodes they have, and what a job can ask for on so many of them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from launcher.planning.derivations import counted
from launcher.slurm.queue import run_command


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """Nodes of a partition with equal resources."""

    nodes: int
    """How many there are."""

    cpus: int
    """Cores of each."""

    gpus: int
    """GPUs of each."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The nodes of a partition, which may differ."""

    kinds: tuple[NodeKind, ...]
    max_time: str | None
    """The longest time of a job in Slurm's notation; None if there is no such limit."""

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return sum(kind.nodes for kind in self.kinds)

    def nodes_with(self, gpus: int) -> int:
        """Return how many nodes have at least so many GPUs."""
        return sum(kind.nodes for kind in self.kinds if kind.gpus >= gpus)

    def most_gpus(self, nodes: int) -> int:
        """Return the largest number of GPUs that each of so many nodes has."""
        return max(kind.gpus for kind in self.kinds if self.nodes_with(kind.gpus) >= nodes)

    def most_cpus(self, nodes: int, gpus: int) -> int:
        """Return the largest number of cores that each of so many nodes with `gpus` GPUs has."""
        fitting = [kind for kind in self.kinds if kind.gpus >= gpus]
        return max(
            kind.cpus
            for kind in fitting
            if sum(other.nodes for other in fitting if other.cpus >= kind.cpus) >= nodes
        )

    @property
    def gpus_in_words(self) -> str:
        """How many nodes have how many GPUs, the largest number first."""
        counts: Counter[int] = Counter()
        for kind in self.kinds:
            counts[kind.gpus] += kind.nodes
        return ", ".join(
            f"{counted(counts[gpus], 'node')} with {counted(gpus, 'GPU')}"
            for gpus in sorted(counts, reverse=True)
        )


def find_partition(name: str | None) -> Partition | None:
    """Return a partition; None if Slurm has no such one.

    Args:
        name: Its name; None is the default partition.

    Raises:
        SlurmError: Slurm does not answer.
    """
    text = run_command("sinfo", "--noheader", "--exact", "-o", "%P|%l|%c|%G|%D")
    rows = [line.split("|") for line in text.splitlines()]
    matching = [
        row
        for row in rows
        if (row[0].endswith("*") if name is None else row[0].rstrip("*") == name)
    ]
    if not matching:
        return None
    times = {row[1] for row in matching} - {"infinite", "n/a"}
    return Partition(
        kinds=tuple(
            NodeKind(nodes=int(row[4]), cpus=int(row[2].rstrip("+")), gpus=gpus_of(row[3]))
            for row in matching
        ),
        max_time=times.pop() if len(times) == 1 else None,
    )


def gpus_of(gres: str) -> int:
    """Return the number of GPUs in a GRES text such as gpu:a100:4(S:0-1),gpu:t4:2,shard:8."""
    counts = re.findall(r"(?:^|,)gpu:(?:[^:(,]+:)?(\d+)", gres)
    return sum(map(int, counts))
