"""How many DataLoader workers a data set is worth, measured while the model is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from launcher.find.probe import Target, run_probe
from launcher.finders.loader import (
    Room,
    SampleCost,
    WorkerCost,
    candidates,
    fewest,
    most_workers,
    predict,
    throughput,
)
from launcher.launch import Stops
from launcher.loading import PREFETCH_FACTOR
from launcher.machine import free_memory_bytes, free_shm_bytes
from launcher.rundir import RunDir, create_run_dir

_WORKER_BYTES = 60e6
"""What a worker was seen to take of its own, before any is measured (torch 2.13, forked)."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was measured with a number of workers; means over the ranks."""

    workers: int
    samples_per_second: float
    """Of all ranks together."""

    wait_seconds_per_step: float
    step_seconds: float
    worker_bytes: float
    """Private memory of a worker; 0 without any."""


@dataclass(frozen=True, kw_only=True)
class FoundLoader:
    """What a recipe's data came to."""

    cost: SampleCost
    """Of one sample, on one rank among all."""

    planned: int
    predicted: int
    """Workers of a rank."""

    most: int
    """There is room for so many."""

    limited_by: str
    readings: tuple[Reading, ...]
    chosen: int
    """The fewest of those measured that are as fast as the fastest."""

    predicted_samples_per_second: float
    """Of all ranks together, with the predicted workers."""


class LoaderSearch:
    """Profiles the reading, predicts how many workers it is worth, and measures that.

    Args:
        target: The recipe.
        seconds: For how long each number of workers is measured.

    Raises:
        PlanError: The recipe cannot be trained like that.
    """

    def __init__(self, target: Target, *, seconds: float) -> None:
        self._target = target
        recipe, self.plan = target.plan()
        self._seconds = seconds
        self._prefetch_factor = recipe.prefetch_factor or PREFETCH_FACTOR

    def run(self, run_dir: RunDir, stops: Stops, tell: Callable[[Reading], None]) -> FoundLoader:
        """Return what was found; `tell` hears of each number of workers.

        Raises:
            EndedError: A run failed or was stopped, which was shown.
        """
        readings: dict[int, Reading] = {}

        def measure(workers: int) -> dict[str, float]:
            values = self._measure(workers, run_dir, stops)
            names = ("samples_per_second", "wait_seconds_per_step", "step_seconds", "worker_bytes")
            readings[workers] = Reading(workers=workers, **{name: values[name] for name in names})
            tell(readings[workers])
            return values

        profile = measure(0)
        cost = SampleCost(
            reading=profile["reading_seconds"],
            reading_cpu=profile["reading_cpu_seconds"],
            computing=profile["computing_seconds"],
            computing_cpu=profile["computing_cpu_seconds"],
        )
        room = self._room()
        worker = WorkerCost(
            memory_bytes=_WORKER_BYTES,
            batch_bytes=profile["batch_bytes"],
            prefetch_factor=self._prefetch_factor,
        )
        most, limited_by = most_workers(room, worker)
        predicted = predict(cost, room, worker)
        for workers in candidates(predicted, self.plan.workers_per_rank, most):
            if workers not in readings:
                measure(workers)
        return FoundLoader(
            cost=cost,
            planned=self.plan.workers_per_rank,
            predicted=predicted,
            most=most,
            limited_by=limited_by,
            readings=tuple(readings[workers] for workers in sorted(readings)),
            chosen=fewest({each.workers: each.samples_per_second for each in readings.values()}),
            predicted_samples_per_second=self.plan.world_size
            * throughput(predicted, cost, room.cores),
        )

    def _room(self) -> Room:
        ranks = self.plan.nproc_per_node
        return Room(
            cores=self._target.machine.usable_cores / ranks,
            memory_bytes=(free_memory_bytes() or self._target.machine.memory_bytes) / ranks,
            shm_bytes=(free_shm_bytes() or 0) / ranks,
        )

    def _measure(self, workers: int, folder: RunDir, stops: Stops) -> dict[str, float]:
        from launcher.engine.worker import launched_reading_probe

        probe = self._target.having(
            "find loader",
            num_workers=workers,
            steps=1_000_000,
            schedule="constant()",
            lr=1e-9,  # the weights are to stay where they compute at their usual speed
            lr_rule="none",
            batch_milestones=(),
            record_samples=False,
            noise_scale=False,
        ).probe()
        run_dir = create_run_dir(folder.path / f"workers-{workers}", probe.plan.recipe)
        run_probe(probe, run_dir, launched_reading_probe, stops, seconds=self._seconds, quiet=True)
        found: dict[str, float] = json.loads(run_dir.reading.read_text(encoding="utf-8"))
        return found
