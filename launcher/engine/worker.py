"""The process of one rank: entered from the elastic agent, or by running a recipe's file."""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.engine.backends.base import Backend
from launcher.engine.failures import fail
from launcher.engine.inspection import inspect_recipe, write_inspection
from launcher.engine.logs import open_output
from launcher.engine.processes import die_with
from launcher.engine.run import join, train_rank
from launcher.job import Job
from launcher.overrides import build
from launcher.plan import Plan
from launcher.recipe import Recipe
from launcher.resolve import resolve
from launcher.rundir import RunDir, create_run_dir, write_yaml
from launcher.world import World, find_world

_until_exit: list[Backend] = []
"""Kept from being taken apart: a gloo thread that still holds Python objects waits for the
interpreter, which would wait for that thread to end (torch 2.13: a deadlock, or SIGABRT)."""


def launched_rank(job: Job) -> None:
    """Train as one rank of `job`; what `launcher run` starts in every process.

    Output goes to the rank's log, and rank 0's to the terminal as well. The process that started
    the ranks shows the first failure.
    """
    die_with(job.launcher_pid)
    # Ctrl-C reaches the process that started the ranks, and the agent there ends them with SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if job.plan.nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    world = find_world()
    output = open_output(
        job.run_dir.log(world.rank),
        own_terminal=True,
        on_terminal=world.rank == 0 and not job.quiet,
    )
    if job.quiet:
        output = replace(output, terminal=io.StringIO())
    try:
        recipe = build(resolve(job.recipe), job.overrides).recipe
        os.environ.setdefault("OMP_NUM_THREADS", str(job.plan.threads_per_rank))
        backend, _ = join(recipe, job.plan, world, lambda: job.run_dir)
        _until_exit.append(backend)
        train_rank(recipe, job.plan, backend, job.run_dir, output, last_step=job.last_step)
        backend.close()
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        _leave(fail(error, world, job.run_dir, log=output.log, show=None))


def launched_inspection(job: Job) -> None:
    """Inspect the recipe of `job` in this process, and write what is found to its run folder."""
    die_with(job.launcher_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = open_output(job.run_dir.log(0), own_terminal=True, on_terminal=False)
    try:
        recipe = build(resolve(job.recipe), job.overrides).recipe
        write_inspection(inspect_recipe(recipe), job.run_dir)
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        _leave(fail(error, World(), job.run_dir, log=output.log, show=None))


def found_rank(
    recipe: Recipe, plan: Plan, world: World, out: Path | None, description: dict[str, Any]
) -> None:
    """Train as the rank that this process was started as by torchrun, accelerate or by hand.

    Args:
        recipe: What to train.
        plan: The plan for the world found.
        world: This process's place in it.
        out: The run folder to make; None makes one below runs/.
        description: What run.yaml says.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.threads_per_rank))

    def make_run_dir() -> RunDir:
        made = create_run_dir(out, plan.recipe)
        write_yaml(made.run_yaml, description)
        return made

    backend, run_dir = join(recipe, plan, world, make_run_dir)
    _until_exit.append(backend)
    output = open_output(run_dir.log(world.rank), own_terminal=False, on_terminal=True)
    try:
        train_rank(recipe, plan, backend, run_dir, output)
        backend.close()
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        _leave(fail(error, world, run_dir, log=output.log, show=output.errors))
    if world.world_size > 1:
        # DDP keeps gloo's threads running after its group is destroyed (torch 2.13; they are still
        # there after a garbage collection). A thread of C++ that comes to touch Python while the
        # interpreter is torn down aborts the process: a finished run would exit with SIGABRT.
        atexit._run_exitfuncs()  # noqa: SLF001
        _leave(0)


def _leave(exit_code: int) -> None:
    """End this process at once, without waiting for threads or for peers that may be lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
