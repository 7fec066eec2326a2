"""The search for DataLoader settings, measured while the model trains.

It has stages: the number of workers, the length of their queues, threads inside them, how they
start, and pinned memory. A stage is skipped when steps no longer wait for data, and a setting is
changed only for a gain beyond noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from launcher.analysis.loader_throughput import (
    MAX_THREADS,
    LoaderBudget,
    SampleCost,
    WorkerCost,
    can_gain,
    fewest_workers,
    is_contender,
    is_faster,
    max_prefetch_factor,
    max_workers,
    predict_workers,
    prefetch_factor_to_hide,
    threads_to_measure,
    throughput,
    worker_counts_to_measure,
)
from launcher.environment.machine import free_memory_bytes, free_shm_bytes
from launcher.errors import UsageError
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.loading import PREFETCH_FACTOR
from launcher.runs.failure_record import RunFailedError
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.tuning.measured_files import LoaderReading, read_loading
from launcher.tuning.probe_run import Target, run_probe

_WORKER_BYTES = 60e6
"""Private memory assumed for a worker before any is measured (seen with torch 2.13, forked)."""

_MAX_STEPS = 1_000_000
"""Steps of a measurement's plan, more than the measurement has time for."""

_MAX_CONTENDERS = 3
"""Numbers of workers that are measured a second time, because they are among the fastest."""


@dataclass(frozen=True, kw_only=True)
class LoaderTrial:
    """What was measured with some settings, averaged over the ranks."""

    workers: int
    """DataLoader workers of each rank."""

    samples_per_second: float
    """Throughput of all ranks together."""

    wait_seconds_per_step: float
    """Seconds per step that a rank waits for data."""

    step_seconds: float
    """Seconds per step."""

    worker_bytes: float
    """Private memory of a worker at the end; 0 without workers."""

    prefetch_factor: int
    """Batches that each worker prefetches."""

    pin_memory: bool
    """Whether batches are copied to pinned memory."""

    worker_threads: int = 1
    """Threads of each worker, or of the rank without workers, that read samples."""

    worker_start: str = "fork"
    """How workers start."""

    worker_proportional_bytes: float = 0.0
    """Private memory of a worker, and its part of what it shares."""

    queue_bytes: float = 0.0
    """Memory of the batches that the workers of a rank prefetch."""

    start_seconds: float = 0.0
    """Seconds until the first batch, which include building the model."""

    measurements: int = 1
    """Number of measurements, of which these are the means."""

    @property
    def can_gain(self) -> bool:
        """Whether steps still wait for data."""
        return can_gain(self.wait_seconds_per_step, self.step_seconds)


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
    """All measurements: one per number of workers in ascending order, then those of the other
    stages in their order."""

    predicted_samples_per_second: float
    """Predicted throughput of all ranks together with the predicted workers."""

    slowest_batch_seconds: float
    """Longest time to read a batch in one process."""

    best: LoaderTrial
    """The measurement of the recommended settings."""

    settings: Mapping[str, Any]
    """The recommended settings of the recipe, by name."""

    notes: tuple[str, ...] = ()
    """What was not tried, and why."""


@dataclass(kw_only=True)
class _Facts:
    """What the stages of a search know, and what they add."""

    cost: SampleCost

    profile: LoaderReading
    """The measurement without workers."""

    budget: LoaderBudget
    worker: WorkerCost
    best: LoaderTrial
    """The measurement of the best settings so far."""

    notes: list[str] = field(default_factory=list)
    """Receives what was not tried, and why."""


class LoaderSearch:
    """A search that profiles reading, predicts a number of workers and measures around it.

    Args:
        target: The recipe.
        seconds: Duration of each measurement.

    Raises:
        PlanError: The recipe cannot be trained with these settings on these ranks.
        UsageError: Its data lies on the device.
    """

    def __init__(self, target: Target, *, seconds: float) -> None:
        self._target = target
        recipe, self.plan = target.plan()
        if recipe.data_on_device:
            raise UsageError(
                "find loader measures DataLoader workers, and data_on_device=true needs none. Add "
                "data_on_device=false to measure how fast the data is read without it."
            )
        self._seconds = seconds
        self._prefetch_factor = recipe.prefetch_factor or PREFETCH_FACTOR
        self._start = recipe.worker_start
        self._planned_threads = recipe.worker_threads

    def run(
        self, run_dir: RunDir, signals: SignalHandler, on_trial: Callable[[LoaderTrial], None]
    ) -> LoaderSearchResult:
        """Measure numbers of workers, then the other settings with the best number.

        Args:
            run_dir: Folder that receives a folder for each measurement.
            signals: The signal handler of this process.
            on_trial: Receives each measurement.

        Raises:
            RunFailedError: A rank failed.
        """
        trials = _Trials(
            lambda folder, **settings: self._measure(
                run_dir.path / folder, signals, on_trial, **settings
            )
        )
        profile = trials.measure(num_workers=0)[2]
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
        predicted = predict_workers(cost, budget, worker)
        limit, limited_by = self._measure_workers(trials, predicted, budget, worker)
        by_workers = sorted(trials.readings, key=lambda reading: reading.workers)
        best = next(each for each in by_workers if each.workers == _fewest(by_workers))
        settings: dict[str, Any] = {"num_workers": best.workers}
        facts = _Facts(cost=cost, profile=profile, budget=budget, worker=worker, best=best)
        for stage in (self._depths, self._threads, self._starts, self._pinning):
            for alternative in stage(facts):
                try:
                    found = trials.measure(**settings | alternative)[0]
                    is_chosen = is_better(found, best)
                    if is_chosen:  # once may be chance, or the machine had become less busy
                        best, before, _ = trials.measure(**settings)
                        found, again, _ = trials.measure(**settings | alternative)
                        is_chosen = is_better(again, before)
                except RunFailedError:
                    if signals.stopped_by is not None:
                        raise
                    facts.notes.append(f"{_text(alternative)} was tried and failed.")
                    continue
                if is_chosen:
                    best, settings = found, settings | alternative
                facts.best = best
        if not best.workers:
            settings = {
                name: value
                for name, value in settings.items()
                if name not in ("prefetch_factor", "worker_start")
            }
        if best.worker_threads != self._planned_threads:
            settings["worker_threads"] = best.worker_threads
        others = [each for each in trials.readings if each not in by_workers]
        return LoaderSearchResult(
            cost=cost,
            planned=self.plan.workers_per_rank,
            predicted=predicted,
            most=limit,
            limited_by=limited_by,
            readings=(*by_workers, *others),
            predicted_samples_per_second=self.plan.data_ranks
            * throughput(predicted, cost, budget.cores),
            slowest_batch_seconds=profile.slowest_batch_seconds,
            best=best,
            settings=settings,
            notes=tuple(facts.notes),
        )

    def _measure_workers(
        self, trials: _Trials, predicted: int, budget: LoaderBudget, worker: WorkerCost
    ) -> tuple[int, str]:
        """Measure numbers of workers until more of them are no faster.

        Returns:
            The largest number that is possible, and what limits it.
        """
        limit, limited_by = max_workers(budget, worker)
        planned = self.plan.workers_per_rank
        for num_workers in worker_counts_to_measure(predicted, planned, limit):
            if num_workers:
                trials.measure(num_workers=num_workers)
        while True:
            measured = max(reading.worker_bytes for reading in trials.readings)
            if measured:
                limit, limited_by = max_workers(budget, replace(worker, memory_bytes=measured))
            # If the largest number is still the fastest, the prediction was too low.
            chosen = _fewest(trials.readings)
            most = max(reading.workers for reading in trials.readings)
            if chosen == most and 0 < 2 * chosen <= limit:
                trials.measure(num_workers=2 * chosen)
                continue
            again = [each for each in _contenders(trials.readings) if each.measurements == 1]
            if not again:
                return limit, limited_by
            for reading in again:
                trials.measure(num_workers=reading.workers)

    def _depths(self, facts: _Facts) -> Iterator[dict[str, Any]]:
        """Yield a longer queue, if steps wait for data or single batches are slow to read."""
        best = facts.best
        if not best.workers:
            return
        seconds_per_batch = best.step_seconds / self.plan.accumulation_steps
        needed = prefetch_factor_to_hide(
            facts.profile.slowest_batch_seconds, best.workers, seconds_per_batch
        )
        if needed <= self._prefetch_factor and best.can_gain:
            needed = 2 * self._prefetch_factor
        depth = min(needed, max_prefetch_factor(best.workers, facts.budget, facts.worker))
        if depth > self._prefetch_factor:
            yield {"prefetch_factor": depth}

    def _threads(self, facts: _Facts) -> Iterator[dict[str, Any]]:
        """Yield threads in the rank itself, and in fewer workers."""
        best, profile = facts.best, facts.profile
        if profile.reason_against_threads is not None:
            facts.notes.append(f"worker_threads was not tried: {profile.reason_against_threads}.")
            return
        choices = threads_to_measure(best.workers, self.plan.micro_batch_size)
        if not choices or not (best.workers or best.can_gain):
            return
        for workers, threads in choices:
            yield {"num_workers": workers, "worker_threads": threads}
        # Threads that wait take no core, and little memory, so that there can be more of them.
        limit = min(self.plan.micro_batch_size, MAX_THREADS)
        while facts.cost.is_latency_bound and facts.best.can_gain and threads < limit:
            threads = min(2 * threads, limit)
            yield {"num_workers": workers, "worker_threads": threads}
            if facts.best.worker_threads != threads:
                return

    def _starts(self, facts: _Facts) -> Iterator[dict[str, Any]]:
        """Yield other ways to start workers, if steps wait for data and not for a core."""
        best = facts.best
        waits_for_cores = not facts.cost.is_latency_bound and best.workers >= facts.budget.cores
        if waits_for_cores:
            return
        if best.workers and best.can_gain and self._start == "fork":
            yield {"worker_start": "forkserver"}
            if best.workers <= facts.budget.cores:
                yield {"worker_start": "spawn"}
            else:
                facts.notes.append(
                    f"worker_start=spawn was not tried: each of {best.workers} workers would "
                    f"import torch, on {facts.budget.cores:g} cores."
                )

    def _pinning(self, facts: _Facts) -> Iterator[dict[str, Any]]:
        """Yield the other choice of pinned memory, on GPUs."""
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
        self,
        folder: Path,
        signals: SignalHandler,
        on_trial: Callable[[LoaderTrial], None],
        **settings: Any,
    ) -> tuple[LoaderTrial, LoaderReading]:
        from launcher.engine.worker import agent_loader_probe

        settings = {"worker_threads": 1, **settings}
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
        run_dir = create_run_dir(folder, probe.plan.recipe)
        run_probe(probe, run_dir, agent_loader_probe, signals, seconds=self._seconds, quiet=True)
        reading = read_loading(run_dir)
        workers = settings["num_workers"]
        prefetch_factor = settings.get("prefetch_factor", self._prefetch_factor)
        trial = LoaderTrial(
            workers=workers,
            prefetch_factor=prefetch_factor,
            pin_memory=settings.get("pin_memory", self.plan.pin_memory),
            worker_threads=settings["worker_threads"],
            worker_start=settings.get("worker_start", self._start),
            samples_per_second=reading.samples_per_second,
            wait_seconds_per_step=reading.wait_seconds_per_step,
            step_seconds=reading.step_seconds,
            worker_bytes=reading.worker_bytes,
            worker_proportional_bytes=reading.worker_proportional_bytes,
            queue_bytes=workers * prefetch_factor * reading.batch_bytes,
            start_seconds=reading.start_seconds,
        )
        on_trial(trial)
        return trial, reading


class _Trials:
    """Measurements by their settings; repeated ones are averaged.

    Args:
        measure: Measures settings in a folder with a name.
    """

    def __init__(self, measure: Callable[..., tuple[LoaderTrial, LoaderReading]]) -> None:
        self._measure = measure
        self._trials: dict[str, list[LoaderTrial]] = {}

    @property
    def readings(self) -> list[LoaderTrial]:
        """Return the mean of the measurements of each setting, in the order of the first ones."""
        return [_mean(trials) for trials in self._trials.values()]

    def measure(self, **settings: Any) -> tuple[LoaderTrial, LoaderTrial, LoaderReading]:
        """Measure settings; return the mean of their measurements, and the new one in two forms."""
        name = "-".join(f"{name}-{value}" for name, value in settings.items())
        trials = self._trials.setdefault(name, [])
        folder = name if not trials else f"{name}-{len(trials) + 1}"
        try:
            trial, reading = self._measure(folder, **settings)
        except RunFailedError:
            if not trials:
                del self._trials[name]
            raise
        trials.append(trial)
        return _mean(trials), trial, reading


def _mean(trials: list[LoaderTrial]) -> LoaderTrial:
    names = (
        "samples_per_second",
        "wait_seconds_per_step",
        "step_seconds",
        "worker_bytes",
        "worker_proportional_bytes",
        "start_seconds",
    )
    means: dict[str, Any] = {
        name: fmean(getattr(trial, name) for trial in trials) for name in names
    }
    return replace(trials[0], **means, measurements=len(trials))


def is_better(trial: LoaderTrial, than: LoaderTrial) -> bool:
    """Return whether settings are faster beyond noise, or as fast with half of the processes."""
    if is_faster(trial.samples_per_second, than.samples_per_second):
        return True
    is_as_fast = not is_faster(than.samples_per_second, trial.samples_per_second)
    return is_as_fast and 2 * trial.workers <= than.workers > 1


def _fewest(readings: list[LoaderTrial]) -> int:
    """Return the smallest measured number of workers that is about as fast as the best."""
    return fewest_workers({reading.workers: reading.samples_per_second for reading in readings})


def _contenders(readings: list[LoaderTrial]) -> list[LoaderTrial]:
    """Return the measurements among which a single one cannot decide; none if there is only one."""
    best = max(reading.samples_per_second for reading in readings)
    close = [each for each in readings if is_contender(each.samples_per_second, best)]
    close.sort(key=lambda each: -each.samples_per_second)
    return close[:_MAX_CONTENDERS] if len(close) > 1 else []


def _text(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())
