"""A model of the number of DataLoader workers that a data set needs.

Reading a sample takes CPU time and time spent waiting for a disk or a network. Workers overlap the
waiting, but share the cores. The rank computes on samples while its workers read the next ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MAX_WORKERS = 32
"""Most workers of a rank; a store that needs more of them needs larger reads instead."""

MAX_THREADS = 32
"""Most threads of a process that read samples."""

MAX_PREFETCH_FACTOR = 16
"""Most batches that a worker prefetches; longer stalls mean that the store is too slow."""

_FAST_ENOUGH = 0.97
"""Fraction of the best throughput that counts as equal to it; fewer workers cost less."""

_CONTENDER = 0.88
"""Fraction of the best throughput from which on a setting is measured again."""

_MANY = 8
"""Workers from which on four threads, and not two, stand for as many workers."""

_USABLE_MEMORY = 0.5
"""Fraction of the free memory that workers and their batches may use."""


@dataclass(frozen=True, kw_only=True)
class SampleCost:
    """The time that one sample costs one rank, in seconds."""

    reading: float
    """Wall time to read the sample in one process."""

    reading_cpu: float
    """CPU time of that."""

    computing: float
    """Wall time to compute on the sample once it has been read."""

    computing_cpu: float
    """CPU time of that over all threads; close to zero if a GPU computes."""

    @property
    def is_latency_bound(self) -> bool:
        """Whether reading spends more time waiting than working."""
        return self.reading_cpu < self.reading / 2

    @property
    def worker_seconds(self) -> float:
        """Seconds that a worker with a core of its own takes for the sample.

        If reading is CPU-bound, wall time beyond the CPU time is contention with other processes.
        """
        return self.reading if self.is_latency_bound else self.reading_cpu


@dataclass(frozen=True, kw_only=True)
class LoaderBudget:
    """The resources that the workers of one rank may share."""

    cores: float
    """Cores of the node per rank, including those that the rank itself computes on."""

    memory_bytes: float
    """Free host memory per rank."""

    shm_bytes: float
    """Free space in /dev/shm per rank."""


@dataclass(frozen=True, kw_only=True)
class WorkerCost:
    """The resources that one worker takes."""

    memory_bytes: float
    """Private memory of the worker process."""

    batch_bytes: float
    """Size of one micro-batch in /dev/shm."""

    prefetch_factor: int
    """Batches that the worker prefetches."""


def throughput(workers: int, cost: SampleCost, cores: float) -> float:
    """Return the samples per second of one rank with a number of workers.

    Without workers, reading and computing add up. With workers, the slowest of reading, computing
    and the cores limits the throughput.

    Args:
        workers: Workers of the rank.
        cost: Cost of one sample.
        cores: Cores for the rank and its workers.
    """
    if workers == 0:
        return 1 / (cost.worker_seconds + cost.computing)
    cpu_seconds = cost.reading_cpu + cost.computing_cpu
    return min(
        workers / cost.worker_seconds,
        1 / cost.computing if cost.computing else math.inf,
        cores / cpu_seconds if cpu_seconds else math.inf,
    )


def max_workers(budget: LoaderBudget, worker: WorkerCost) -> tuple[int, str]:
    """Return the largest number of workers that the budget allows, and what limits it."""
    limits = {f"the maximum of {MAX_WORKERS} per rank": float(MAX_WORKERS)}
    queue_bytes = worker.prefetch_factor * worker.batch_bytes
    if worker.memory_bytes:  # /dev/shm is a part of the host memory
        worker_bytes = worker.memory_bytes + queue_bytes
        limits["host memory"] = _USABLE_MEMORY * budget.memory_bytes / worker_bytes
    if worker.batch_bytes:
        limits["/dev/shm"] = _USABLE_MEMORY * budget.shm_bytes / queue_bytes  # noqa: S108  # a label
    name = min(limits, key=limits.__getitem__)
    return max(int(limits[name]), 0), name


def predict_workers(cost: SampleCost, budget: LoaderBudget, worker: WorkerCost) -> int:
    """Return the fewest workers of a rank that are as fast as any number within the budget."""
    limit, _ = max_workers(budget, worker)
    rates = {workers: throughput(workers, cost, budget.cores) for workers in range(limit + 1)}
    return fewest_workers(rates)


def max_prefetch_factor(workers: int, budget: LoaderBudget, worker: WorkerCost) -> int:
    """Return the most batches that each of `workers` may prefetch into /dev/shm, at least 1."""
    if not worker.batch_bytes:
        return MAX_PREFETCH_FACTOR
    limit = _USABLE_MEMORY * budget.shm_bytes / (workers * worker.batch_bytes)
    return min(max(int(limit), 1), MAX_PREFETCH_FACTOR)


def prefetch_factor_to_hide(slowest: float, workers: int, seconds_per_batch: float) -> int:
    """Return the batches that each worker must prefetch to hide the slowest one.

    Batches are consumed in order. A worker starts on a batch when as many batches come before it
    as all workers prefetch together, which is the time it has to read it.

    Args:
        slowest: Longest time to read a batch, in seconds.
        workers: Workers of a rank.
        seconds_per_batch: Time between two batches that the rank consumes.
    """
    return max(math.ceil(slowest / (workers * seconds_per_batch)), 1)


def can_gain(wait_seconds: float, step_seconds: float) -> bool:
    """Return whether steps wait for data for longer than what counts as noise."""
    return wait_seconds > (1 - _FAST_ENOUGH) * step_seconds


def is_contender(rate: float, best: float) -> bool:
    """Return whether a throughput is so close to the best that one measurement cannot decide."""
    return rate >= _CONTENDER * best


def threads_to_measure(workers: int, samples: int) -> list[tuple[int, int]]:
    """Return (workers, threads of each) that read about as many samples at a time as `workers` do.

    The first reads in the rank itself, and the second in fewer processes.

    Args:
        workers: The number of workers that is fast enough with one thread each.
        samples: Samples of a micro-batch, which the threads of a process share.
    """
    at_once = max(workers, 2)
    threads = 4 if at_once >= _MANY else 2
    choices = [(0, min(at_once, samples)), (-(-at_once // threads), min(threads, samples))]
    return [choice for choice in choices if choice[1] > 1]


def fewest_workers(rates: Mapping[int, float]) -> int:
    """Return the smallest number of workers whose throughput is about as good as the best.

    Args:
        rates: Samples per second by number of workers; not empty.
    """
    best = max(rates.values())
    return min(workers for workers, rate in rates.items() if rate >= _FAST_ENOUGH * best)


def is_faster(rate: float, than: float) -> bool:
    """Return whether a throughput exceeds another by more than measurement noise."""
    return rate * _FAST_ENOUGH > than


def worker_counts_to_measure(predicted: int, planned: int, limit: int) -> list[int]:
    """Return the numbers of workers to measure, in ascending order.

    They are the planned and the predicted number, and half and twice the predicted one. Numbers
    above `limit` are omitted, except for the planned one.
    """
    counts = {planned, predicted, predicted // 2, min(2 * predicted or 1, limit)}
    return sorted(count for count in counts if count <= limit or count == planned)
