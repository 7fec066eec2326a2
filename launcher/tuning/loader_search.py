"""The search for the number of DataLoader workers, measured while the model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.analysis.loader_throughput import (
    LoaderBudget,
    SampleCost,
    WorkerCost,
    fewest_workers,
    is_faster,
    max_prefetch_factor,
    max_workers,
    predict_workers,
    prefetch_factor_to_hide,
    throughput,
    worker_counts_to_measure,
)
from launcher.environment.machine import free_memory_bytes, free_shm_bytes
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.loading import PREFETCH_FACTOR
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.tuning.measured_files import LoaderReading, read_loading
from launcher.tuning.probe_run import Target, run_probe

_WORKER_BYTES = 60e6
"""Private memory assumed for a worker before any is measured (seen with torch 2.13, forked)."""

_MAX_STEPS = 1_000_000
"""Steps of a measurement's plan, more than the measurement has time for."""


@dataclass(frozen=True, kw_only=True)
class LoaderTrial:
    """A measurement with one number of workers, averaged over the ranks."""

    workers: int
    """DataLoader workers of each rank."""

    samples_per_second: float
    """Throughput of all ranks together."""

    wait_seconds_per_step: float
    """Seconds per step that a rank waits for data."""

    step_seconds: float
    """Seconds per step."""

    worker_bytes: float
    """Private memory of a worker; 0 without workers."""

    prefetch_factor: int
    """Batches that each worker prefetches."""

    pin_memory: bool
    """Whether batches are copied to pinned memory."""


@dataclass(frozen=True, kw_only=True)
class LoaderSearchResult:
    """The result of a search for DataLoader settings."""

    cost: SampleCost
    """Cost of one sample, measured while all ranks read and compute."""

    planned: int
    """Workers per rank in the recipe's plan."""

    predicted: int
    """Workers per rank that the model of `launcher.analysis.loader_throughput` predicts."""

    most: int
    """Largest number of workers per rank that the resources allow."""

    limited_by: str
    """The resource that sets that limit."""

    readings: tuple[LoaderTrial, ...]
    """All measurements: one per number of workers in ascending order, then those with the chosen
    number and a longer queue or, on GPUs, the other choice of pinned memory."""

    predicted_samples_per_second: float
    """Predicted throughput of all ranks together with the predicted workers."""

    slowest_batch_seconds: float
    """Longest time to read a batch in one process."""

    best: LoaderTrial
    """The measurement of the recommended settings."""

    settings: Mapping[str, Any]
    """The recommended settings of the recipe, by name."""


class LoaderSearch:
    """A search that profiles reading, predicts a number of workers and measures around it.

    Args:
        target: The recipe.
        seconds: Duration of each measurement.

    Raises:
        PlanError: The recipe cannot be trained with these settings on these ranks.
    """

    def __init__(self, target: Target, *, seconds: float) -> None:
        self._target = target
        recipe, self.plan = target.plan()
        self._seconds = seconds
        self._prefetch_factor = recipe.prefetch_factor or PREFETCH_FACTOR

    def run(
        self, run_dir: RunDir, signals: SignalHandler, on_trial: Callable[[LoaderTrial], None]
    ) -> LoaderSearchResult:
        """Measure numbers of workers, then longer queues and pinned memory with the best number.

        Args:
            run_dir: Folder that receives a folder for each measurement.
            signals: The signal handler of this process.
            on_trial: Receives each measurement.

        Raises:
            RunFailedError: A rank failed.
        """
        readings: list[LoaderTrial] = []

        def measure(**settings: Any) -> LoaderReading:
            values = self._measure(run_dir, signals, **settings)
            readings.append(self._reading(values, **settings))
            on_trial(readings[-1])
            return values

        profile = measure(num_workers=0)
        cost = SampleCost(
            reading=profile.reading_seconds,
            reading_cpu=profile.reading_cpu_seconds,
            computing=profile.computing_seconds,
            computing_cpu=profile.computing_cpu_seconds,
        )
        budget = self._budget()
        worker = WorkerCost(
            memory_bytes=_WORKER_BYTES,
            batch_bytes=profile.batch_bytes,
            prefetch_factor=self._prefetch_factor,
        )
        limit, limited_by = max_workers(budget, worker)
        predicted = predict_workers(cost, budget, worker)
        for num_workers in worker_counts_to_measure(predicted, self.plan.workers_per_rank, limit):
            if num_workers:
                measure(num_workers=num_workers)
        # If the largest number is still the fastest, the prediction was too low.
        while (chosen := _fewest(readings)) == max(reading.workers for reading in readings):
            if not 0 < 2 * chosen <= limit:
                break
            measure(num_workers=2 * chosen)
        readings.sort(key=lambda reading: reading.workers)
        best = next(reading for reading in readings if reading.workers == chosen)
        settings: dict[str, Any] = {"num_workers": chosen}
        slowest = profile.slowest_batch_seconds
        for alternative in self._alternatives(best, slowest, budget, worker):
            measure(**settings, **alternative)
            if is_faster(readings[-1].samples_per_second, best.samples_per_second):
                best, settings = readings[-1], settings | alternative
        return LoaderSearchResult(
            cost=cost,
            planned=self.plan.workers_per_rank,
            predicted=predicted,
            most=limit,
            limited_by=limited_by,
            readings=tuple(readings),
            predicted_samples_per_second=self.plan.data_ranks
            * throughput(predicted, cost, budget.cores),
            slowest_batch_seconds=slowest,
            best=best,
            settings=settings,
        )

    def _alternatives(
        self, best: LoaderTrial, slowest: float, budget: LoaderBudget, worker: WorkerCost
    ) -> Iterator[dict[str, Any]]:
        """Yield further settings that are worth measuring with the best number of workers."""
        if best.workers:
            seconds_per_batch = best.step_seconds / self.plan.accumulation_steps
            prefetch_factor = min(
                prefetch_factor_to_hide(slowest, best.workers, seconds_per_batch),
                max_prefetch_factor(best.workers, budget, worker),
            )
            if prefetch_factor > self._prefetch_factor:
                yield {"prefetch_factor": prefetch_factor}
        if self.plan.device == "cuda":
            yield {"pin_memory": not self.plan.pin_memory}

    def _budget(self) -> LoaderBudget:
        ranks = self.plan.nproc_per_node
        return LoaderBudget(
            cores=self._target.machine.usable_cores / ranks,
            memory_bytes=(free_memory_bytes() or self._target.machine.memory_bytes) / ranks,
            shm_bytes=(free_shm_bytes() or 0) / ranks,
        )

    def _measure(
        self, search_dir: RunDir, signals: SignalHandler, **settings: Any
    ) -> LoaderReading:
        from launcher.engine.worker import agent_loader_probe

        probe = self._target.with_settings(
            "find loader",
            **settings,
            steps=_MAX_STEPS,
            schedule="constant()",
            lr=1e-9,  # diverged weights would compute at another speed
            lr_rule="none",
            batch_milestones=(),
            record_samples=False,
            noise_scale=False,
        ).probe()
        folder = "-".join(f"{name}-{value}" for name, value in settings.items())
        run_dir = create_run_dir(search_dir.path / folder, probe.plan.recipe)
        run_probe(probe, run_dir, agent_loader_probe, signals, seconds=self._seconds, quiet=True)
        return read_loading(run_dir)

    def _reading(self, reading: LoaderReading, **settings: Any) -> LoaderTrial:
        return LoaderTrial(
            workers=settings["num_workers"],
            prefetch_factor=settings.get("prefetch_factor", self._prefetch_factor),
            pin_memory=settings.get("pin_memory", self.plan.pin_memory),
            samples_per_second=reading.samples_per_second,
            wait_seconds_per_step=reading.wait_seconds_per_step,
            step_seconds=reading.step_seconds,
            worker_bytes=reading.worker_bytes,
        )


def _fewest(readings: list[LoaderTrial]) -> int:
    """Return the smallest measured number of workers that is about as fast as the best."""
    return fewest_workers({reading.workers: reading.samples_per_second for reading in readings})
