"""How many DataLoader workers a data set is worth, measured while the model is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.analysis.loader_throughput import (
    Room,
    SampleCost,
    WorkerCost,
    candidates,
    fewest,
    is_faster,
    longest_queue,
    most_workers,
    predict,
    queue_to_bridge,
    throughput,
)
from launcher.environment.machine import free_memory_bytes, free_shm_bytes
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.loading import PREFETCH_FACTOR
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.tuning.probe_run import Target, run_probe

_WORKER_BYTES = 60e6
"""What a worker was seen to take of its own, before any is measured (torch 2.13, forked)."""


@dataclass(frozen=True, kw_only=True)
class LoaderTrial:
    """What was measured with a number of workers; means over the ranks."""

    workers: int
    samples_per_second: float
    """Of all ranks together."""

    wait_seconds_per_step: float
    step_seconds: float
    worker_bytes: float
    """Private memory of a worker; 0 without any."""

    prefetch_factor: int
    """Batches that each worker held ready."""

    pin_memory: bool


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
    readings: tuple[LoaderTrial, ...]
    """With numbers of workers; then, with the fewest that are as fast as any of those, a longer
    queue where it may bridge what is slow, and on GPUs the other way of pinning."""

    predicted_samples_per_second: float
    """Of all ranks together, with the predicted workers."""

    slowest_batch_seconds: float
    """To read, in one process."""

    best: LoaderTrial
    """Of those, what the settings say."""

    settings: Mapping[str, Any]
    """For the recipe."""


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

    def run(
        self, run_dir: RunDir, signals: SignalHandler, tell: Callable[[LoaderTrial], None]
    ) -> FoundLoader:
        """Return what was found; `tell` hears of each number of workers.

        Raises:
            EndedError: A run failed or was stopped, which was shown.
        """
        profile = self._measure(run_dir, signals, num_workers=0)
        readings = [self._reading(profile, num_workers=0)]
        tell(readings[0])
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

        def measure(**settings: Any) -> LoaderTrial:
            readings.append(self._reading(self._measure(run_dir, signals, **settings), **settings))
            tell(readings[-1])
            return readings[-1]

        for workers in candidates(predicted, self.plan.workers_per_rank, most):
            if workers:
                measure(num_workers=workers)
        while True:
            rates = {each.workers: each.samples_per_second for each in readings}
            chosen = fewest(rates)
            if chosen < max(rates) or not 0 < 2 * chosen <= most:
                break
            measure(num_workers=2 * chosen)  # as long as that is faster, whatever was predicted
        readings.sort(key=lambda reading: reading.workers)
        best = next(each for each in readings if each.workers == chosen)
        settings: dict[str, Any] = {"num_workers": chosen}
        for other in self._alternatives(best, profile["slowest_batch_seconds"], room, worker):
            if is_faster(measure(**settings, **other).samples_per_second, best.samples_per_second):
                best, settings = readings[-1], settings | other
        return FoundLoader(
            cost=cost,
            planned=self.plan.workers_per_rank,
            predicted=predicted,
            most=most,
            limited_by=limited_by,
            readings=tuple(readings),
            predicted_samples_per_second=self.plan.world_size
            * throughput(predicted, cost, room.cores),
            slowest_batch_seconds=profile["slowest_batch_seconds"],
            best=best,
            settings=settings,
        )

    def _alternatives(
        self, best: LoaderTrial, slowest: float, room: Room, worker: WorkerCost
    ) -> Iterator[dict[str, Any]]:
        """Yield what else is worth measuring with the best number of workers."""
        if best.workers:
            per_batch = best.step_seconds / self.plan.accumulation_steps
            queue = queue_to_bridge(slowest, best.workers, per_batch)
            queue = min(queue, longest_queue(best.workers, room, worker))
            if queue > self._prefetch_factor:
                yield {"prefetch_factor": queue}
        if self.plan.device == "cuda":
            yield {"pin_memory": not self.plan.pin_memory}

    def _room(self) -> Room:
        ranks = self.plan.nproc_per_node
        return Room(
            cores=self._target.machine.usable_cores / ranks,
            memory_bytes=(free_memory_bytes() or self._target.machine.memory_bytes) / ranks,
            shm_bytes=(free_shm_bytes() or 0) / ranks,
        )

    def _measure(self, folder: RunDir, signals: SignalHandler, **settings: Any) -> dict[str, float]:
        from launcher.engine.worker import agent_loader_probe

        probe = self._target.having(
            "find loader",
            **settings,
            steps=1_000_000,
            schedule="constant()",
            lr=1e-9,  # the weights are to stay where they compute at their usual speed
            lr_rule="none",
            batch_milestones=(),
            record_samples=False,
            noise_scale=False,
        ).probe()
        name = "-".join(f"{name}-{value}" for name, value in settings.items())
        run_dir = create_run_dir(folder.path / name, probe.plan.recipe)
        run_probe(probe, run_dir, agent_loader_probe, signals, seconds=self._seconds, quiet=True)
        found: dict[str, float] = json.loads(run_dir.reading.read_text(encoding="utf-8"))
        return found

    def _reading(self, values: Mapping[str, float], **settings: Any) -> LoaderTrial:
        names = ("samples_per_second", "wait_seconds_per_step", "step_seconds", "worker_bytes")
        return LoaderTrial(
            workers=settings["num_workers"],
            prefetch_factor=settings.get("prefetch_factor", self._prefetch_factor),
            pin_memory=settings.get("pin_memory", self.plan.pin_memory),
            **{name: values[name] for name in names},
        )
