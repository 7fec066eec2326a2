"""Some steps of the loop under torch.profiler, on every rank, each part of a step by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from launcher.analysis.step_profile import PREFIX, read_profile
from launcher.engine.backends.base import Backend
from launcher.engine.data.reader import MicroBatch
from launcher.engine.probes.measuring import ProbeContext
from launcher.engine.training.loop import TrainContext, train
from launcher.runs.heartbeat import PHASES
from launcher.runs.rundir import write_json


def profile_steps(probe: ProbeContext, *, warm_up: int) -> None:
    """Take the plan's steps, the first to warm up; leave each rank's trace, and what all say."""
    backend, run_dir = probe.backend, probe.run_dir
    steps = probe.plan.total_steps
    activities = [ProfilerActivity.CPU]
    if backend.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    path = run_dir.trace(backend.rank)
    path.parent.mkdir(exist_ok=True)
    profiler = profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=warm_up, active=steps - warm_up, repeat=1),
        on_trace_ready=lambda each: each.export_chrome_trace(str(path)),
    )

    def at_and_step(step: int, phase: str) -> None:
        if step and phase == PHASES[1]:
            profiler.step()  # the one before has ended
        probe.report_phase(step, phase)

    with probe.collector() as callback:
        context = probe.context(report_phase=at_and_step)
        with profiler:
            train(_named(context), callback, last_step=steps)
            if backend.device.type == "cuda":
                torch.cuda.synchronize(backend.device)
            profiler.step()
    every = backend.gather(asdict(read_profile(path)))
    if backend.rank == 0:
        write_json(run_dir.profile, {"ranks": every})


def _named(context: TrainContext) -> TrainContext:
    """Return what is trained, with the parts of its steps named in the trace."""
    recipe = context.recipe
    named = replace(
        recipe,
        forward=_within("forward", recipe.forward),
        loss=_within("forward", recipe.loss),
    )
    backend = cast("Backend", _NamedBackend(context.backend))
    return replace(context, recipe=named, backend=backend, batches=_NamedBatches(context.batches))


def _within(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*args, **kwargs)

    return named


class _NamedBackend:
    """A backend whose work has names in the trace."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.to_device = _within("data", backend.to_device)
        self.backward = _within("backward", backend.backward)
        self.apply = _within("optimizer", backend.apply)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class _NamedBatches:
    """Micro-batches, the wait for which has a name in the trace."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        with record_function(PREFIX + "data"):
            return next(self._batches)
