"""What the process of every rank does, however it was started: watch, diagnose, exit."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launcher.engine.backends.base import Backend
from launcher.engine.backends.devices import planned_device
from launcher.engine.data.loader_workers import remove_semaphores
from launcher.engine.probes.diagnostics import diagnose_rank, free_memory
from launcher.engine.probes.diagnostics_recipe import diagnostics_recipe
from launcher.engine.process_group import join
from launcher.engine.ranks.output import Output
from launcher.engine.ranks.watchdog import Watchdog
from launcher.environment.world import World
from launcher.findings import Finding, RankDiagnostics
from launcher.planning.plan import Plan
from launcher.recipe.hang_limits import hang_limits
from launcher.recipe.recipe import Recipe
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest, end_process

_open_backends: list[Backend] = []
"""Backends that must not be destroyed before the process exits.

The destructor waits for gloo's threads, and a gloo thread that still holds Python objects waits for
the interpreter (torch 2.13: a deadlock, or SIGABRT)."""

temporary_files = contextlib.ExitStack()
"""Removes the temporary files of this process when it is closed."""


def keep_open(backend: Backend) -> None:
    """Keep a backend from being destroyed before this process exits."""
    _open_backends.append(backend)


def report_binding(backend: Backend, output: Output) -> None:
    """Write to the log which CPUs this rank keeps to; if it should and cannot, warn of it."""
    binding = backend.cpu_binding
    if binding is None:
        return
    text = f"launcher: rank {backend.rank} is {binding.text}\n"
    (sys.stderr if binding.is_refused else output.log).write(text)


def start_watchdog(
    recipe: Recipe, world: World, run_dir: RunDir, stop: StopRequest, output: Output
) -> Watchdog:
    """Start the watchdog of this rank, with the limits that the recipe sets."""
    return Watchdog(
        run_dir,
        world.rank,
        world.world_size,
        limits=hang_limits(recipe.hang_timeout),
        stop=stop,
        log=output.log,
        errors=output.errors,
    )


def plan_diagnostics_recipe(plan: Plan) -> Recipe:
    """Return the recipe that the ranks of a plan for diagnostics build."""
    return diagnostics_recipe(plan.world_size, plan.settings["device"])


def diagnose(
    plan: Plan,
    world: World,
    node_findings: tuple[Finding, ...],
    report: Callable[[], object],
) -> list[RankDiagnostics]:
    """Test this rank and the communication with the others; return the results of all ranks.

    Args:
        plan: The plan for diagnostics.
        world: This process's place among the ranks.
        node_findings: What this rank has already found out about its node.
        report: Called after each stage. Starting CUDA, joining the group, connecting NCCL and
            importing packages may each take many seconds.
    """
    recipe = plan_diagnostics_recipe(plan)
    memory = free_memory(planned_device(recipe, plan, world.local_rank))
    report()
    started = time.perf_counter()
    # The run folder is not used, because nothing is trained.
    backend, _ = join(recipe, plan, world, lambda: RunDir(Path()), report=report)
    keep_open(backend)
    report()
    rendezvous_seconds = time.perf_counter() - started
    own = diagnose_rank(
        backend,
        rendezvous_seconds=rendezvous_seconds,
        device_memory=memory,
        node_findings=node_findings,
        report=report,
    )
    diagnostics = backend.gather(own)
    backend.close()
    return diagnostics


def exit_now(exit_code: int) -> None:
    """End this process without waiting for threads, or for peers that may be lost."""
    try:
        temporary_files.close()
        remove_semaphores()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        end_process(exit_code)
