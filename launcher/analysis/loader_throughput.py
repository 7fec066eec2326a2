"""How many DataLoader workers a data set is worth: a model of what limits it.

Reading a sample takes some time, of which the processor works a part; the rest is waiting for a
disk or a network, which workers can do together. Computing on it takes some time as well, while
workers read on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MOST_WORKERS = 32
"""Of a rank; a store that needs more wants larger reads, not more of them."""

MOST_PREFETCH = 16
"""Batches that a worker holds ready; what takes longer is no stall but a store that is too slow."""

_AS_FAST = 0.97
"""A number of workers at this part of the best throughput is as fast: the smaller costs less."""

_SHARE = 0.5
"""Part of the free memory that workers and their batches may take."""


@dataclass(frozen=True, kw_only=True)
class SampleCost:
    """What one sample costs one rank, in seconds."""

    reading: float
    """To read, in one process."""

    reading_cpu: float
    """Processor time of that."""

    computing: float
    """To compute on, when the data are there."""

    computing_cpu: float
    """Processor time of that, over all threads: next to nothing where a GPU computes."""

    @property
    def waits(self) -> bool:
        """Whether reading is more waiting than work."""
        return self.reading_cpu < self.reading / 2

    @property
    def pace(self) -> float:
        """Seconds of one worker for a sample, when it has a core: work waits for nothing else."""
        return self.reading if self.waits else self.reading_cpu


@dataclass(frozen=True, kw_only=True)
class Room:
    """What one rank's workers may use."""

    cores: float
    """Its part of the node's, its own computation included."""

    memory_bytes: float
    """Its part of what is free of the host's."""

    shm_bytes: float
    """Its part of what is free of /dev/shm."""


@dataclass(frozen=True, kw_only=True)
class WorkerCost:
    """What one worker takes."""

    memory_bytes: float
    batch_bytes: float
    """Of one micro-batch, in /dev/shm."""

    prefetch_factor: int


def throughput(workers: int, cost: SampleCost, cores: float) -> float:
    """Return the samples per second of one rank with so many workers."""
    if workers == 0:
        return 1 / (cost.pace + cost.computing)
    work = cost.reading_cpu + cost.computing_cpu
    limits = [workers / cost.pace, 1 / cost.computing if cost.computing else math.inf]
    limits.append(cores / work if work else math.inf)
    return min(limits)


def most_workers(room: Room, worker: WorkerCost) -> tuple[int, str]:
    """Return how many workers there is room for, and what limits it."""
    limits = {"more would not help any store": float(MOST_WORKERS)}
    if worker.memory_bytes:
        limits["host memory"] = _SHARE * room.memory_bytes / worker.memory_bytes
    if worker.batch_bytes:
        held = worker.prefetch_factor * worker.batch_bytes
        limits["/dev/shm"] = _SHARE * room.shm_bytes / held  # noqa: S108  # a name
    name = min(limits, key=limits.__getitem__)
    return max(int(limits[name]), 0), name


def predict(cost: SampleCost, room: Room, worker: WorkerCost) -> int:
    """Return the fewest workers of a rank that are as fast as any number there is room for."""
    most, _ = most_workers(room, worker)
    rates = {number: throughput(number, cost, room.cores) for number in range(most + 1)}
    return fewest(rates)


def longest_queue(workers: int, room: Room, worker: WorkerCost) -> int:
    """Return the batches that each worker may hold ready, by the room in /dev/shm."""
    if not worker.batch_bytes:
        return MOST_PREFETCH
    most = _SHARE * room.shm_bytes / (workers * worker.batch_bytes)
    return min(max(int(most), 1), MOST_PREFETCH)


def queue_to_bridge(slowest: float, workers: int, seconds_per_batch: float) -> int:
    """Return the batches that each worker has to hold ready, so that the slowest stalls nothing.

    Batches are taken in order. A worker begins with one when it is as many batches away as all
    workers hold together, and has until then to read it.

    Args:
        slowest: Seconds that reading a batch has taken at most.
        workers: Of a rank.
        seconds_per_batch: Between two batches that are taken.
    """
    return max(math.ceil(slowest / (workers * seconds_per_batch)), 1)


def fewest(rates: Mapping[int, float]) -> int:
    """Return the fewest workers whose throughput is as good as the best of those given."""
    best = max(rates.values())
    return min(number for number, rate in rates.items() if rate >= _AS_FAST * best)


def is_faster(rate: float, than: float) -> bool:
    """Return whether a throughput is better by more than what measuring scatters."""
    return rate * _AS_FAST > than


def candidates(predicted: int, planned: int, most: int) -> list[int]:
    """Return the numbers of workers to verify: what was planned, what is predicted, and around."""
    around = {planned, predicted, predicted // 2, min(2 * predicted or 1, most)}
    return sorted(number for number in around if number <= most or number == planned)
