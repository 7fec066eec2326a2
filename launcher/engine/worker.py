"""The process of one rank: entered from the elastic agent, or by running a recipe's file."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from launcher.engine.backends.base import Backend
from launcher.engine.data.loader_workers import remove_semaphores
from launcher.engine.probes.diagnostics import diagnose_rank
from launcher.engine.probes.diagnostics_recipe import DIAGNOSTICS_TIMEOUT, diagnostics_recipe
from launcher.engine.probes.inspection import inspect_recipe, write_inspection
from launcher.engine.probes.measuring import (
    ProbeContext,
    limit_memory,
    measure_noise,
    test_range,
    time_reading,
    time_size,
)
from launcher.engine.probes.profiling import profile_steps
from launcher.engine.ranks.external_store import open_store
from launcher.engine.ranks.failures import fail
from launcher.engine.ranks.output import Output, open_output
from launcher.engine.ranks.processes import die_with_parent
from launcher.engine.ranks.turns import Turns
from launcher.engine.ranks.usage import usage_of
from launcher.engine.ranks.watchdog import Watchdog
from launcher.engine.run import join, train_rank
from launcher.environment.world import World, find_world
from launcher.errors import EXIT_RESUMABLE, LauncherError, TrainingError
from launcher.findings import Finding, RankDiagnostics
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.job import Job, RecipeSource, ReportWriter, ResumeFrom
from launcher.runs.rundir import RunDir, write_atomic
from launcher.signals import STOP_SIGNALS, StopRequest

_until_exit: list[Backend] = []
"""Kept from being taken apart: a gloo thread that still holds Python objects waits for the
interpreter, which would wait for that thread to end (torch 2.13: a deadlock, or SIGABRT)."""


@dataclass(frozen=True, kw_only=True)
class _Rank:
    """What a rank that was launched has to work with."""

    job: Job
    recipe: Recipe
    backend: Backend
    output: Output
    stop: StopRequest | None
    """Notes what asks the rank to stop; None where it has nothing to save."""

    report_phase: Callable[[int, str], None]
    """Is told how far the rank is."""


def agent_rank(job: Job) -> int:
    """Train as one rank of `job`; what `launcher run` starts in every process.

    Returns:
        The exit code of the run.
    """
    return _run_agent_rank(job, _train)


def _train(rank: _Rank) -> int:
    result = train_rank(
        rank.recipe,
        rank.job.plan,
        rank.backend,
        rank.job.run_dir,
        rank.output,
        stop=rank.stop,
        start=_start(rank.job),
        last_step=rank.job.last_step,
        trial=rank.job.trial,
        source=rank.job.source,
        report_phase=rank.report_phase,
        write_report=rank.job.write_report,
    )
    return EXIT_RESUMABLE if result is None else 0


def agent_range_test(job: Job) -> int:
    """Take part in a learning-rate range test, whose curve rank 0 leaves in the run folder."""
    return _probe(job, test_range)


def agent_noise_probe(job: Job) -> int:
    """Take part in measuring the gradient noise, which rank 0 leaves in the run folder."""
    assert job.last_step is not None
    return _probe(job, functools.partial(measure_noise, last_step=job.last_step))


def agent_size_probe(job: Job) -> int:
    """Take part in timing a size of micro-batch, within the memory that `job` allows."""

    def within_memory(probe: ProbeContext) -> None:
        limit_memory(probe.backend.device, job.memory_bytes)
        time_size(probe)

    return _probe(job, within_memory)


def agent_loader_probe(job: Job) -> int:
    """Take part in timing how samples are read while the model is trained."""
    assert job.seconds is not None
    return _probe(job, functools.partial(time_reading, seconds=job.seconds))


def agent_profile(job: Job) -> int:
    """Take part in looking at where the time of steps goes; `last_step` of the job warms up."""
    assert job.last_step is not None
    return _probe(job, functools.partial(profile_steps, warm_up=job.last_step))


def _probe(job: Job, measure: Callable[[ProbeContext], None]) -> int:
    """Measure something as one rank of `job`; return the exit code."""

    def work(rank: _Rank) -> int:
        probe = ProbeContext(
            recipe=rank.recipe,
            source=job.source,
            plan=job.plan,
            backend=rank.backend,
            run_dir=job.run_dir,
            output=rank.output,
            report_phase=rank.report_phase,
        )
        measure(probe)
        return 0

    return _run_agent_rank(job, work)


def _run_agent_rank(job: Job, work: Callable[[_Rank], int]) -> int:
    """Do `work` as one rank of `job`, in a process that the elastic agent has started.

    Output goes to the rank's log, and rank 0's to the terminal as well. The process that started
    the ranks shows the first failure.

    Args:
        job: What is run.
        work: What the rank does once the group is formed; it returns the exit code.
    """
    stop = _listen() if job.saves else None
    if stop is None:
        _do_not_listen()
    die_with_parent(job.launcher_pid)
    world = _world(job)
    output = open_output(
        job.run_dir.log(world.rank),
        own_terminal=True,
        on_terminal=world.rank == 0,
        output_mode=job.output_mode,
    )
    try:
        if job.folder is not None:
            os.chdir(job.folder)
        recipe = job.source.build()
        os.environ.setdefault("OMP_NUM_THREADS", str(job.plan.threads_per_rank))
        watch = _watch(recipe, world, job.run_dir, stop or StopRequest(), output)
        backend, _ = join(recipe, job.plan, world, lambda: job.run_dir)
        _until_exit.append(backend)
        watch.usage = usage_of(backend.device)
        rank = _Rank(
            job=job,
            recipe=recipe,
            backend=backend,
            output=output,
            stop=stop,
            report_phase=watch.report_phase,
        )
        code = work(rank)
        backend.close()
        watch.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent's, should another rank still fail
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        _leave(fail(error, world, job.run_dir, log=output.log, show=None, stop=stop))
    return code


def _world(job: Job) -> World:
    """Return this rank's place. Those of a run that begins again meet anew, in a file of theirs."""
    world = find_world()
    if job.meeting_place is None:
        return world
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return replace(world, store=job.meeting_place / f"ranks{again}")


def _listen() -> StopRequest:
    stop = StopRequest()
    stop.listen(interrupts=False)  # Ctrl-C is for the process that started the ranks to handle
    return stop


def _do_not_listen() -> None:
    """Be ended by signals at once, as a process that has nothing to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _watch(
    recipe: Recipe, world: World, run_dir: RunDir, stop: StopRequest, output: Output
) -> Watchdog:
    return Watchdog(
        run_dir,
        world.rank,
        world.world_size,
        hang_timeout=recipe.hang_timeout,
        stop=stop,
        log=output.log,
    )


def _start(job: Job) -> ResumeFrom | None:
    """Return where to begin: a run that failed and was started again goes on from what it saved."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and list_checkpoints(job.run_dir):
        return replace(job.start or ResumeFrom(), step=None, fall_back=True)
    return job.start


def agent_inspection(job: Job) -> None:
    """Inspect the recipe of `job` in this process, and write what is found to its run folder."""
    _do_not_listen()
    die_with_parent(job.launcher_pid)
    output = open_output(job.run_dir.log(0), own_terminal=True, on_terminal=False)
    try:
        recipe = job.source.build()
        write_inspection(inspect_recipe(recipe, job.source), job.run_dir)
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        _leave(fail(error, World(), job.run_dir, log=output.log, show=None))


def agent_diagnostics(job: Job) -> None:
    """Examine this rank and its group; rank 0 leaves all reports in the run folder of `job`."""
    stop = StopRequest()
    _do_not_listen()
    die_with_parent(job.launcher_pid)
    world = _world(job)
    output = open_output(job.run_dir.log(world.rank), own_terminal=True, on_terminal=False)
    try:
        recipe = _diagnostics_recipe(job.plan)
        watch = _watch(recipe, world, job.run_dir, stop, output)
        watch.report_phase(0, "computing")
        reports = _diagnose(job.plan, world, ())
        watch.close()
        if world.rank == 0:
            write_atomic(job.run_dir.diagnostics, msgspec.json.encode(reports).decode())
    except Exception as error:  # noqa: BLE001  # whatever torch raises
        _leave(fail(error, world, job.run_dir, log=output.log, show=None, stop=stop))


def external_diagnostics(
    plan: Plan, world: World, node: tuple[Finding, ...]
) -> list[RankDiagnostics] | None:
    """Examine the rank that this process was started as; return all reports on rank 0.

    Raises:
        LauncherError: The ranks do not form the group that was planned, or fail.
    """
    faulthandler.dump_traceback_later(DIAGNOSTICS_TIMEOUT, exit=True)
    try:
        reports = _diagnose(plan, world, node)
    except LauncherError:
        raise
    except Exception as error:
        name = f"rank {world.rank} ({platform.node()})"
        raise TrainingError(f"{name} failed: {type(error).__name__}: {error}") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    return reports if world.rank == 0 else None


def _diagnostics_recipe(plan: Plan) -> Recipe:
    return diagnostics_recipe(plan.world_size, plan.settings["device"])


def _diagnose(plan: Plan, world: World, node: tuple[Finding, ...]) -> list[RankDiagnostics]:
    started = time.perf_counter()
    # No run folder: nothing is trained.
    backend, _ = join(_diagnostics_recipe(plan), plan, world, lambda: RunDir(Path()))
    _until_exit.append(backend)
    reports = backend.gather(diagnose_rank(backend, time.perf_counter() - started, node))
    backend.close()
    return reports


def external_count(world: World, count: Callable[[], int], *, stop: StopRequest) -> int:
    """Return what `count` returns on the first rank of this node, where alone it is called.

    Ranks that would all read the data at once would all download it.

    Args:
        world: This process's place, as it was started by torchrun, accelerate or by hand.
        count: Reads data and returns a number.
        stop: Notes what asks this process to stop.

    Raises:
        WorldError: The ranks do not meet.
        LostRankError: The first rank has failed.
    """
    if world.world_size == 1:
        return count()
    with stop.ending_at_once():
        return Turns(open_store(world), world).once("counted the training samples", count)


def external_rank(
    recipe: Recipe,
    plan: Plan,
    world: World,
    make_run_dir: Callable[[], RunDir],
    *,
    stop: StopRequest,
    start: ResumeFrom | None,
    source: RecipeSource,
    write_report: ReportWriter | None = None,
) -> int:
    """Train as the rank that this process was started as by torchrun, accelerate or by hand.

    Args:
        recipe: What to train.
        plan: The plan for the world found.
        world: This process's place in it.
        make_run_dir: Makes the run folder or takes the one to resume; called on rank 0.
        stop: Notes what asks this process to stop.
        start: From which checkpoint to go on, if from any.
        source: What the recipe is built from.
        write_report: Writes the page that experiment trackers get; None sends them none.

    Returns:
        The exit code of this process; of several ranks each ends here instead.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.threads_per_rank))
    with stop.ending_at_once() if world.world_size > 1 else contextlib.nullcontext():
        backend, run_dir = join(recipe, plan, world, make_run_dir)
    _until_exit.append(backend)
    output = open_output(run_dir.log(world.rank), own_terminal=False, on_terminal=True)
    try:
        watch = _watch(recipe, world, run_dir, stop, output)
        watch.usage = usage_of(backend.device)
        result = train_rank(
            recipe,
            plan,
            backend,
            run_dir,
            output,
            stop=stop,
            start=start,
            source=source,
            report_phase=watch.report_phase,
            write_report=write_report,
        )
        backend.close()
        watch.close()
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        _leave(fail(error, world, run_dir, log=output.log, show=output.errors, stop=stop))
    code = EXIT_RESUMABLE if result is None else 0
    if world.world_size > 1:
        # DDP keeps gloo's threads running after its group is destroyed (torch 2.13; they are still
        # there after a garbage collection). A thread of C++ that comes to touch Python while the
        # interpreter is torn down aborts the process: a finished run would exit with SIGABRT.
        atexit._run_exitfuncs()  # noqa: SLF001
        _leave(code)
    return code


def _leave(exit_code: int) -> None:
    """End this process at once, without waiting for threads or for peers that may be lost."""
    remove_semaphores()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
