"""Measuring with the loop's own step: trainings whose weights are thrown away.

Each is a run of its own in fresh processes, so that nothing has to be put back.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from launcher.analysis.batch_sizes import MARGIN
from launcher.analysis.gradient_noise import Measurement
from launcher.analysis.lr_curve import Divergence, LossCurve
from launcher.console.progress import Progress
from launcher.engine.backends.base import Backend
from launcher.engine.data.reader import MicroBatch
from launcher.engine.metrics.meter import RankFlags, StepRow
from launcher.engine.ranks.output import Output
from launcher.engine.ranks.processes import children, peak_bytes, private_bytes, run_delay
from launcher.engine.training.build import build_context
from launcher.engine.training.loop import TrainContext, train
from launcher.planning.global_batch import ceil_div
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe
from launcher.runs.job import RecipeSource
from launcher.runs.rundir import RunDir, write_json


class MetricsCollector:
    """A listener that keeps the rows of all steps, and shows how far it is.

    Args:
        progress: Where to show it; None on all ranks but 0.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.rows: list[StepRow] = []
        self.noise: list[Measurement] = []

    def on_micro_batches(self, step: int, micro_batches: list[MicroBatch]) -> None:
        """Sample ids are of no interest here."""

    def on_steps(self, rows: list[StepRow]) -> None:
        self.rows += rows
        if rows and self._progress is not None:
            last = rows[-1]
            self._progress.stepped(last.step, last.loss, last.lr, last.samples_per_second)

    def on_noise(self, measurements: list[Measurement]) -> None:
        self.noise += measurements

    def on_warning(self, text: str) -> None:
        """A loss that is not finite is what some of these are looking for."""

    def on_note(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing is saved."""

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Nothing is evaluated."""


@dataclass(frozen=True, kw_only=True)
class ProbeContext:
    """What is measured, on one rank."""

    recipe: Recipe
    source: RecipeSource
    """What the recipe is built from."""

    plan: Plan
    backend: Backend
    run_dir: RunDir
    output: Output
    report_phase: Callable[[int, str], None]
    """Is told how far the rank is."""

    def context(self, last_step: int | None = None, **options: Any) -> TrainContext:
        """Build what is trained for so many steps, all that are planned by default.

        Args:
            last_step: Steps.
            options: Further ones of `build_context`.
        """
        steps = self.plan.total_steps if last_step is None else last_step
        given: dict[str, Any] = {
            "evaluates": False,
            "source": self.source,
            "report_phase": self.report_phase,
        }
        given |= options
        return build_context(self.recipe, self.plan, self.backend, last_step=steps, **given)

    @contextlib.contextmanager
    def collector(self, steps: int | None = None) -> Iterator[MetricsCollector]:
        """Return a listener that shows on rank 0 how far it is."""
        if self.backend.rank != 0:
            yield MetricsCollector(None)
            return
        progress = self.output.progress(self.plan.total_steps if steps is None else steps)
        try:
            yield MetricsCollector(progress)
        finally:
            progress.close()


class _StopAtDivergence:
    """An attendant that stops where the losses that `collector` has kept diverge.

    The losses are those of the global batch, the same on every rank, so all stop alike.
    """

    def __init__(self, collector: MetricsCollector) -> None:
        self._gauge = collector
        self._divergence = Divergence()
        self.seen = 0
        """Losses up to the one at which it stopped."""

    def is_due(self, step: int) -> bool:
        return False

    def flags(self) -> RankFlags:
        return RankFlags()

    def on_step_end(self, step: int, flags: RankFlags) -> bool:
        for row in self._gauge.rows[self.seen :]:
            self.seen += 1
            if self._divergence.add(row.loss):
                return True
        return False


def test_range(probe: ProbeContext) -> None:
    """Train along the plan's schedule until the loss diverges; rank 0 writes the curve."""
    with probe.collector() as callback:
        until = _StopAtDivergence(callback)
        train(probe.context(), callback, until)
    if probe.backend.rank == 0:
        seen = callback.rows[: until.seen]
        rows = list(itertools.takewhile(lambda row: math.isfinite(row.loss), seen))
        curve = LossCurve(lrs=tuple(row.lr for row in rows), losses=tuple(row.loss for row in rows))
        write_json(probe.run_dir.curve, asdict(curve))


def measure_noise(probe: ProbeContext, *, last_step: int) -> None:
    """Train to `last_step`, measuring the gradient noise in every step; rank 0 writes it."""
    with probe.collector(last_step) as callback:
        context = probe.context(last_step, noise_stride=1)
        train(context, callback, last_step=last_step)
    if probe.backend.rank == 0:
        finite = [each for each in callback.noise if math.isfinite(each.small + each.big)]
        write_json(probe.run_dir.noise, {"measurements": [asdict(each) for each in finite]})


def time_size(probe: ProbeContext) -> None:
    """Take the plan's steps, of which the first is not timed; rank 0 writes speed and memory."""
    backend, steps = probe.backend, probe.plan.total_steps
    with probe.collector() as callback:
        context = probe.context()
        train(context, callback, last_step=1)
        started = time.perf_counter()
        train(context, callback, first_step=1, last_step=steps)  # its numbers are read at the end
        seconds = time.perf_counter() - started
    samples = context.sampler.samples_before(steps) - context.sampler.samples_before(1)
    peak = max(backend.gather(peak_bytes(backend.device)))
    if backend.rank == 0:
        values = {
            "samples_per_second": samples / seconds,
            "peak_bytes": peak,
            "num_trained": context.num_trained,
        }
        write_json(probe.run_dir.size, values)


def time_reading(probe: ProbeContext, *, seconds: float) -> None:
    """Train for some seconds once the workers' queues have been used up; rank 0 writes the times.

    All ranks read and compute at once, as they will. What is written is the mean over ranks.
    """
    plan, backend = probe.plan, probe.backend
    held = plan.workers_per_rank * (plan.prefetch_factor or 0)
    first = 2 + ceil_div(held, plan.accumulation_steps)
    with probe.collector() as callback:
        context = probe.context()
        watched = _TimedBatches(context.batches)
        context = replace(context, batches=watched)
        train(context, callback, last_step=first)
        workers = [private_bytes(pid) for pid in children()]
        watched.restart()
        started, used = time.perf_counter(), time.process_time()
        trained = train(
            context,
            callback,
            _StopAfterSeconds(seconds),
            first_step=first,
            last_step=plan.total_steps,
        )
        passed, used = time.perf_counter() - started, time.process_time() - used
    counted = context.sampler.samples_before
    samples = counted(trained.step) - counted(first)
    steps = trained.step - first
    own = {
        "samples_per_second": samples / passed,
        "wait_seconds_per_step": watched.seconds / steps,
        "step_seconds": passed / steps,
        # Less what other processes took of the core: that is not the data set's.
        "reading_seconds": max(watched.seconds - watched.delay, 0.0) / watched.samples,
        "reading_cpu_seconds": watched.cpu_seconds / watched.samples,
        "computing_seconds": (passed - watched.seconds) / watched.samples,
        "computing_cpu_seconds": (used - watched.cpu_seconds) / watched.samples,
        "slowest_batch_seconds": watched.slowest,
        "batch_bytes": float(watched.batch_bytes),
        "worker_bytes": statistics.fmean(workers) if workers else 0.0,
    }
    every = backend.gather(own)
    if backend.rank == 0:
        means = {name: statistics.fmean(each[name] for each in every) for name in own}
        write_json(probe.run_dir.reading, means)


class _TimedBatches:
    """Micro-batches, with what it took to get them: on the clock, and of this thread's work."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self._batches = batches
        self.batch_bytes = 0
        """Of the largest."""

        self.restart()

    def restart(self) -> None:
        """Begin to count anew."""
        self.seconds = self.cpu_seconds = self.delay = self.slowest = 0.0
        self.samples = 0

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        delayed = run_delay()
        asked, used = time.perf_counter(), time.thread_time()
        micro_batch = next(self._batches)
        delayed = run_delay() - delayed
        passed = time.perf_counter() - asked
        self.delay += delayed
        self.seconds += passed
        self.slowest = max(self.slowest, passed - delayed)
        self.cpu_seconds += time.thread_time() - used
        self.samples += len(micro_batch.request.indices)
        tensors = (each for each in tree_leaves(micro_batch.batch) if isinstance(each, Tensor))
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.batch_bytes = max(self.batch_bytes, size)
        return micro_batch


class _StopAfterSeconds:
    """An attendant that stops after some seconds, when any rank has had them."""

    def __init__(self, seconds: float) -> None:
        self._until = time.perf_counter() + seconds

    def is_due(self, step: int) -> bool:
        return False

    def flags(self) -> RankFlags:
        return RankFlags(stop=float(time.perf_counter() > self._until))

    def on_step_end(self, step: int, flags: RankFlags) -> bool:
        return flags.stop > 0


def limit_memory(device: torch.device, num_bytes: int | None) -> None:
    """Have an allocation fail that goes beyond so many bytes of this rank.

    On CPUs of its private memory, which is what torch allocates (Linux 4.7); on a GPU of what
    torch's allocator takes. None is the GPU's memory less a margin; without a GPU it is no limit.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = 1 - MARGIN if num_bytes is None else min(num_bytes / total, 1.0)
        torch.cuda.set_per_process_memory_fraction(fraction, device)
    elif num_bytes is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:
            num_bytes = min(num_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, hard))
