"""Measure with the real training step, in trainings whose weights are thrown away.

Each measurement is a run of its own in fresh processes, so no state has to be restored. The
function that measures is called on every rank, and rank 0 writes the result to the run folder.
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

from launcher.analysis.batch_sizes import MEMORY_MARGIN
from launcher.analysis.gradient_noise import Measurement
from launcher.analysis.lr_curve import Divergence, LossCurve
from launcher.console.progress import Progress
from launcher.engine.backends.base import Backend
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.sample_threads import SampleThreads
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.metrics.meter import RankFlags
from launcher.engine.probes.worker_queues import num_bytes
from launcher.engine.ranks.output import Output
from launcher.engine.ranks.processes import (
    StepMemory,
    peak_bytes,
    process_memory,
    run_delay,
    worker_pids,
)
from launcher.engine.training.build import build_context
from launcher.engine.training.context import StepController, TrainContext
from launcher.engine.training.loop import train
from launcher.planning.global_batch import ceil_div
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe
from launcher.runs.files import write_json
from launcher.runs.job import RecipeSource
from launcher.runs.rundir import RunDir
from launcher.runs.step_row import StepRow

_CHECKED_THREADS, _CHECKED_SAMPLES = 4, 8
"""Threads and samples with which a data set is checked for whether threads may read it."""


class MetricsCollector:
    """A `Listener` that keeps the measurements of all steps and shows progress.

    Args:
        progress: Shows the steps on rank 0; None on the other ranks.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.rows: list[StepRow] = []
        self.noise: list[Measurement] = []

    def on_micro_batches(self, step: int, micro_batches: list[MicroBatch]) -> None:
        """Do nothing: probes need no sample ids."""

    def on_steps(self, rows: list[StepRow]) -> None:
        self.rows += rows
        if rows and self._progress is not None:
            last = rows[-1]
            self._progress.show_step(last.step, last.loss, last.lr, last.samples_per_second)

    def on_noise(self, measurements: list[Measurement]) -> None:
        self.noise += measurements

    def on_warning(self, text: str) -> None:
        """Do nothing: a range test trains until the loss is not finite."""

    def on_values(self, step: int, values: Mapping[str, Any]) -> None:
        """Do nothing: probes save no checkpoints."""

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Do nothing: probes do not evaluate."""


_ENOUGH_PRECISION = 0.005
"""Standard error of a throughput, relative to it, with which its measurement ends early. Rates that
differ by 3 % are told apart."""

_NUM_PARTS = 10
"""Parts of equal numbers of steps whose durations give the standard error."""

_SHORTEST_PART = 0.25
"""Fraction of the longest duration that is measured at least."""


@dataclass(frozen=True, kw_only=True)
class ProbeContext:
    """What a probe measures, on one rank."""

    recipe: Recipe
    source: RecipeSource
    """What the recipe is built from; spawned DataLoader workers need it."""

    plan: Plan
    backend: Backend
    run_dir: RunDir
    output: Output
    report_phase: Callable[[int, str], None]
    """Called with (steps taken, phase) whenever this rank enters a phase; the watchdog uses it."""

    def build_train_context(self, last_step: int | None = None, **options: Any) -> TrainContext:
        """Build data, model and optimizer for a training without evaluation (collective).

        Args:
            last_step: Number of steps that will be taken; None is all planned steps.
            options: Further arguments of `build_context`, which take precedence.
        """
        num_steps = self.plan.total_steps if last_step is None else last_step
        arguments: dict[str, Any] = {
            "evaluates": False,
            "source": self.source,
            "report_phase": self.report_phase,
        }
        arguments |= options
        return build_context(self.recipe, self.plan, self.backend, last_step=num_steps, **arguments)

    @contextlib.contextmanager
    def collect_metrics(self, num_steps: int | None = None) -> Iterator[MetricsCollector]:
        """Yield a collector that shows progress on rank 0.

        Args:
            num_steps: Number of steps that will be taken; None is all planned steps.
        """
        if self.backend.rank != 0:
            yield MetricsCollector(None)
            return
        progress = self.output.progress(self.plan.total_steps if num_steps is None else num_steps)
        try:
            yield MetricsCollector(progress)
        finally:
            progress.close()


_FEWEST_STEPS = 4
"""Steps that are timed at least."""

_TIMED_SECONDS = 0.5
"""Duration for which steps are timed, if there are enough of them."""


class StopAtDivergence(StepController):
    """Stops when the collected losses diverge.

    The losses are those of the global batch, equal on every rank, so all ranks stop together.
    """

    def __init__(self, collector: MetricsCollector) -> None:
        self._collector = collector
        self._divergence = Divergence()
        self._num_losses = 0

    def on_step_end(self, step: int, flags: RankFlags) -> bool:
        for row in self._collector.rows[self._num_losses :]:
            self._num_losses += 1
            if self._divergence.add(row.loss):
                return True
        return False

    def curve(self) -> LossCurve:
        """Return the learning rates and losses of the steps until the loss diverged."""
        rows = self._collector.rows[: self._num_losses]
        finite = list(itertools.takewhile(lambda row: math.isfinite(row.loss), rows))
        lrs, losses = tuple(row.lr for row in finite), tuple(row.loss for row in finite)
        return LossCurve(lrs=lrs, losses=losses)


def run_range_test(probe: ProbeContext) -> None:
    """Train along the planned schedule until the loss diverges; rank 0 writes the loss curve."""
    with probe.collect_metrics() as collector:
        controller = StopAtDivergence(collector)
        train(probe.build_train_context(), collector, controller)
    if probe.backend.rank == 0:
        write_json(probe.run_dir.curve, asdict(controller.curve()))


def measure_noise(probe: ProbeContext, *, last_step: int) -> None:
    """Measure the gradient noise in each of `last_step` steps; rank 0 writes the measurements."""
    with probe.collect_metrics(last_step) as collector:
        context = probe.build_train_context(last_step, noise_stride=1)
        train(context, collector, last_step=last_step)
    if probe.backend.rank == 0:
        measurements = [
            asdict(measurement)
            for measurement in collector.noise
            if math.isfinite(measurement.small + measurement.big)
        ]
        momenta = [row.momentum or 0.0 for row in collector.rows]
        values = {"momentum": statistics.fmean(momenta), "measurements": measurements}
        write_json(probe.run_dir.noise, values)


def time_micro_batch_size(probe: ProbeContext) -> None:
    """Time steps after the first ones; rank 0 writes throughput and peak memory."""
    _time_steps(probe, lambda: peak_bytes(probe.backend.device))


def time_strategy(probe: ProbeContext) -> None:
    """Time steps after the first ones; rank 0 writes throughput and peak memory.

    The peak is that of these steps alone. On a CPU it is resident memory beyond what this process
    had before it built the model, with an allocator that returns the memory of freed tensors.
    """
    meter, build_model = StepMemory(probe.backend.device), probe.recipe.model

    def build_measured_model() -> Any:
        meter.start()
        return build_model()

    recipe = replace(probe.recipe, model=build_measured_model)
    _time_steps(replace(probe, recipe=recipe), meter.peak, meter.reset)


def _time_steps(
    probe: ProbeContext, read_peak: Callable[[], int], on_warm: Callable[[], None] = lambda: None
) -> None:
    """Time steps after the first ones; rank 0 writes throughput and peak memory.

    The first step allocates memory and connects the ranks. The next ones use up the batches that
    workers read ahead, as far as the planned steps suffice. Steps are timed for half a second, and
    at least four are.

    Args:
        probe: What is measured.
        read_peak: Returns the peak memory of this rank, in bytes, after the last step.
        on_warm: Called after the first step.
    """
    backend, plan = probe.backend, probe.plan
    warm_steps = max(min(1 + _steps_read_ahead(plan), plan.total_steps - _FEWEST_STEPS), 1)
    with probe.collect_metrics() as collector:
        context = probe.build_train_context()

        def take_steps(first_step: int, last_step: int) -> float:
            """Return the duration of some steps."""
            started = time.perf_counter()
            # `train` reads the metrics at its end, which waits for the device.
            train(context, collector, first_step=first_step, last_step=last_step)
            return time.perf_counter() - started

        take_steps(0, 1)
        first_peak = read_peak()
        on_warm()
        if warm_steps > 1:
            take_steps(1, warm_steps)
        last_step = min(warm_steps + _FEWEST_STEPS, plan.total_steps)
        seconds = take_steps(warm_steps, last_step)
        slowest = max(backend.gather(seconds))  # all ranks take the same number of steps
        wanted = int(_TIMED_SECONDS / slowest * (last_step - warm_steps))
        end = min(max(warm_steps + wanted, last_step), plan.total_steps)
        if end > last_step:
            seconds += take_steps(last_step, end)
    samples = context.sampler.samples_before(end) - context.sampler.samples_before(warm_steps)
    peaks = backend.gather((read_peak(), first_peak))
    peak = max(peak for peak, _ in peaks)
    if backend.rank == 0:
        values = {
            "samples_per_second": samples / seconds,
            "peak_bytes": peak,
            "start_peak_bytes": max(first_peak for _, first_peak in peaks),
            "num_trained": context.num_trained,
        }
        write_json(probe.run_dir.size, values)


def _steps_read_ahead(plan: Plan) -> int:
    """Return the steps for which the workers of a rank have read all batches when it starts."""
    num_batches = plan.workers_per_rank * (plan.prefetch_factor or 0)
    return ceil_div(num_batches, plan.accumulation_steps)


def time_data_loading(probe: ProbeContext, *, seconds: float) -> None:
    """Time how samples are read while the model trains; rank 0 writes the means over ranks.

    All ranks read and compute at the same time, as in a real run.

    Args:
        probe: What is measured.
        seconds: Longest duration of the measurement, which starts when the prefetched batches are
            used up. It ends before if the throughput is known to `_ENOUGH_PRECISION`.
    """
    plan, backend = probe.plan, probe.backend
    first_step = 2 + _steps_read_ahead(plan)
    begin = time.perf_counter()
    with probe.collect_metrics() as collector:
        context = probe.build_train_context()
        reading = _TimedBatches(context.micro_batches)
        context = replace(context, micro_batches=reading)
        train(context, collector, last_step=first_step)
        reading.reset()
        started, cpu_started = time.perf_counter(), time.process_time()
        outcome = train(
            context,
            collector,
            _StopOnceMeasured(seconds),
            first_step=first_step,
            last_step=plan.total_steps,
        )
        elapsed, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        # Now, because pages that workers share with the rank become their own while they read.
        workers = [process_memory(pid) for pid in worker_pids()]
    samples_before = context.sampler.samples_before
    num_samples = samples_before(outcome.step) - samples_before(first_step)
    num_steps = outcome.step - first_step
    own_values = {
        "samples_per_second": num_samples / elapsed,
        "wait_seconds_per_step": reading.seconds / num_steps,
        "step_seconds": elapsed / num_steps,
        # Without the time in which other processes had the core, which the data set does not cost.
        "reading_seconds": max(reading.seconds - reading.run_delay, 0.0) / reading.num_samples,
        "reading_cpu_seconds": reading.cpu_seconds / reading.num_samples,
        "computing_seconds": (elapsed - reading.seconds) / reading.num_samples,
        "computing_cpu_seconds": (cpu_seconds - reading.cpu_seconds) / reading.num_samples,
        "slowest_batch_seconds": reading.slowest,
        "batch_bytes": float(reading.batch_bytes),
        "worker_bytes": statistics.fmean([each.private for each in workers] or [0]),
        "worker_proportional_bytes": statistics.fmean(
            [each.proportional for each in workers] or [0]
        ),
        "start_seconds": reading.first - begin,
    }
    values_by_rank = backend.gather(own_values)
    conflict = _reason_against_threads(context) if not plan.workers_per_rank else None
    if backend.rank == 0:
        means: dict[str, Any] = {
            name: statistics.fmean(values[name] for values in values_by_rank) for name in own_values
        }
        write_json(probe.run_dir.reading, {**means, "reason_against_threads": conflict})


def _reason_against_threads(context: TrainContext) -> str | None:
    """Return why several threads of a process do not help to read the samples, or None."""
    samples = context.sampler.batch_ids(0)[:_CHECKED_SAMPLES]
    request = MicroBatchRequest("train", 0, samples, has_weight=False, trial=True)
    return context.reader.reason_against_threads(request, SampleThreads(_CHECKED_THREADS))


class _TimedBatches:
    """Micro-batches with the time that this thread spends on getting them."""

    def __init__(self, micro_batches: Iterator[MicroBatch]) -> None:
        self._micro_batches = micro_batches
        self.batch_bytes = 0
        """Size of the largest micro-batch."""

        self.first = 0.0
        """When the first micro-batch arrived."""

        self.reset()

    def reset(self) -> None:
        """Set all totals to zero."""
        self.seconds = self.cpu_seconds = self.run_delay = self.slowest = 0.0
        self.num_samples = 0

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        delay = run_delay()
        started, cpu_started = time.perf_counter(), time.thread_time()
        micro_batch = next(self._micro_batches)
        delay = run_delay() - delay
        arrived = time.perf_counter()
        elapsed = arrived - started
        self.first = self.first or arrived
        self.run_delay += delay
        self.seconds += elapsed
        self.slowest = max(self.slowest, elapsed - delay)
        self.cpu_seconds += time.thread_time() - cpu_started
        self.num_samples += len(micro_batch.request.indices)
        self.batch_bytes = max(self.batch_bytes, num_bytes(micro_batch))
        return micro_batch


class _StopOnceMeasured(StepController):
    """Stops all ranks when one has measured a throughput or its time is up.

    Args:
        seconds: Longest duration of the measurement.
    """

    def __init__(self, seconds: float) -> None:
        self._times = [time.perf_counter()]
        self._end = self._times[0] + seconds
        self._first_end = self._times[0] + _SHORTEST_PART * seconds

    def flags(self) -> RankFlags:
        self._times.append(time.perf_counter())
        now = self._times[-1]
        is_done = now > self._end or (now > self._first_end and self._is_precise())
        return RankFlags(stop=float(is_done))

    def _is_precise(self) -> bool:
        """Return whether the mean duration of a step is known well enough."""
        length = (len(self._times) - 1) // _NUM_PARTS
        if length < 2:
            return False
        edges = self._times[-1 - length * _NUM_PARTS :: length]
        parts = [after - before for before, after in itertools.pairwise(edges)]
        mean = statistics.fmean(parts)
        return statistics.stdev(parts) <= _ENOUGH_PRECISION * mean * _NUM_PARTS**0.5

    def on_step_end(self, step: int, flags: RankFlags) -> bool:
        return flags.stop > 0


@contextlib.contextmanager
def limited_memory(device: torch.device, num_bytes: int | None) -> Iterator[None]:
    """Limit the memory of this rank, so that allocations beyond it fail.

    The limit ends with the context, so that a failure can be reported.

    Args:
        device: On a GPU the limit holds for torch's allocator; on a CPU for the private memory of
            the process, which is what torch allocates (Linux 4.7 or newer).
        num_bytes: The limit. None is the memory of the GPU that other processes leave free, less a
            margin, or no limit on a CPU.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        available = (free + torch.cuda.memory_reserved(device)) / total - MEMORY_MARGIN
        fraction = max(available, 0.0) if num_bytes is None else min(num_bytes / total, 1.0)
        torch.cuda.set_per_process_memory_fraction(fraction, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
    if num_bytes is not None:
        most = num_bytes if hard_limit == resource.RLIM_INFINITY else min(num_bytes, hard_limit)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard_limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft_limit, hard_limit))
