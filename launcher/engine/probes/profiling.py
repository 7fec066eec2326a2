"""Profile a few training steps with torch.profiler on every rank, each part of a step named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from launcher.analysis.step_profile import PREFIX, holds_kernels, read_profile
from launcher.engine.backends.base import Backend
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.probes.measuring import ProbeContext
from launcher.engine.training.context import TrainContext
from launcher.engine.training.loop import train
from launcher.errors import TrainingError
from launcher.recipe.recipe import Recipe
from launcher.runs.files import write_json
from launcher.runs.heartbeat import PHASES


def profile_steps(probe: ProbeContext, *, warm_up: int) -> None:
    """Take the planned steps under the profiler (collective).

    Each rank writes its trace; rank 0 writes a summary of all traces.

    Args:
        probe: What is profiled.
        warm_up: Number of steps at the start that are not recorded.
    """
    backend, run_dir = probe.backend, probe.run_dir
    num_steps = probe.plan.total_steps
    activities = [ProfilerActivity.CPU]
    if backend.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    path = run_dir.trace(backend.rank)
    path.parent.mkdir(exist_ok=True)
    profiler = profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=warm_up, active=num_steps - warm_up, repeat=1),
        on_trace_ready=lambda finished: finished.export_chrome_trace(str(path)),
    )

    def report_phase(step: int, phase: str) -> None:
        if step and phase == PHASES[1]:  # the previous step has ended
            if step == warm_up and backend.device.type == "cuda":
                # Kernels of the warm-up would otherwise run in the recorded steps.
                torch.cuda.synchronize(backend.device)
            profiler.step()
        probe.report_phase(step, phase)

    with probe.collect_metrics() as collector:
        context = probe.build_train_context(report_phase=report_phase)
        with profiler:
            train(_name_parts(context), collector, last_step=num_steps)
            if backend.device.type == "cuda":
                torch.cuda.synchronize(backend.device)
            profiler.step()
    has_kernels = backend.device.type == "cpu" or holds_kernels(path)
    if backend.any_rank(not has_kernels):
        raise TrainingError(
            "torch.profiler has recorded no kernel of a GPU. Another profiler may be attached, or "
            "the driver or the container keeps users from profiling: NVIDIA's driver has the "
            "option NVreg_RestrictProfilingToAdminUsers=0, and under WSL 2 the control panel of "
            "the driver has a setting for it."
        )
    profiles = backend.gather(asdict(read_profile(path)))
    if backend.rank == 0:
        write_json(run_dir.profile, {"ranks": profiles})


def _name_parts(context: TrainContext) -> TrainContext:
    """Return the context with the parts of its steps named in the trace."""
    return replace(
        context,
        recipe=_name_functions(context.recipe),
        backend=cast("Backend", _NamedBackend(context.backend)),
        micro_batches=_NamedBatches(context.micro_batches),
        objectives=tuple(
            replace(
                each,
                recipe=_name_functions(each.recipe),
                backend=cast("Backend", _NamedBackend(each.backend)),
            )
            for each in context.objectives
        ),
    )


def _name_functions(recipe: Recipe) -> Recipe:
    """Return a recipe whose calls of forward and loss are named in the trace."""
    return replace(
        recipe,
        forward=_name_calls("forward", recipe.forward),
        loss=_name_calls("forward", recipe.loss),
    )


def _name_calls(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with its calls recorded under the name of a part of the step."""

    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*args, **kwargs)

    return named


class _NamedBackend:
    """A backend whose calls are named in the trace."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.to_device = _name_calls("data", backend.to_device)
        self.backward = _name_calls("backward", backend.backward)
        self.apply = _name_calls("optimizer", backend.apply)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class _NamedBatches:
    """Micro-batches whose reading is named in the trace."""

    def __init__(self, micro_batches: Iterator[MicroBatch]) -> None:
        self._micro_batches = micro_batches

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        with record_function(PREFIX + "data"):
            return next(self._micro_batches)
