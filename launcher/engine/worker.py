"""Entry points of a rank's process, by how it was started.

agent_*     called in each process that the elastic agent starts (`launcher run` and the finders)
external_*  called in processes that torchrun, accelerate launch or a user started (`python
            recipe.py`)
"""

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
    run_range_test,
    time_data_loading,
    time_micro_batch_size,
)
from launcher.engine.probes.profiling import profile_steps
from launcher.engine.process_group import join
from launcher.engine.ranks.external_store import open_store
from launcher.engine.ranks.failures import fail
from launcher.engine.ranks.output import Output, open_output
from launcher.engine.ranks.processes import die_with_parent
from launcher.engine.ranks.turns import Turns
from launcher.engine.ranks.usage import usage_of
from launcher.engine.ranks.watchdog import Watchdog
from launcher.engine.run import train_rank
from launcher.environment.world import World, find_world
from launcher.errors import EXIT_RESUMABLE, LauncherError, TrainingError
from launcher.findings import Finding, RankDiagnostics
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.job import Job, RecipeSource, ReportWriter, ResumeFrom
from launcher.runs.rundir import RunDir, write_atomic
from launcher.signals import STOP_SIGNALS, StopRequest

_open_backends: list[Backend] = []
"""Backends that must not be destroyed before the process exits.

The destructor waits for gloo's threads, and a gloo thread that still holds Python objects waits for
the interpreter (torch 2.13: a deadlock, or SIGABRT)."""


@dataclass(frozen=True, kw_only=True)
class _AgentRank:
    """A rank that the elastic agent has started, once the process group is formed."""

    job: Job
    recipe: Recipe
    backend: Backend
    output: Output
    stop: StopRequest | None
    """Records the signals that ask the rank to stop; None if the rank has nothing to save."""

    report_phase: Callable[[int, str], None]
    """Called with (steps taken, phase) whenever the rank enters a phase; the watchdog uses it."""


def agent_rank(job: Job) -> int:
    """Train as one rank of `job`; `launcher run` calls this in every process that it starts.

    Returns:
        The exit code of the run.
    """
    return _run_agent_rank(job, _train)


def _train(rank: _AgentRank) -> int:
    result = train_rank(
        rank.recipe,
        rank.job.plan,
        rank.backend,
        rank.job.run_dir,
        rank.output,
        stop=rank.stop,
        start=_choose_start(rank.job),
        last_step=rank.job.last_step,
        trial=rank.job.trial,
        source=rank.job.source,
        report_phase=rank.report_phase,
        write_report=rank.job.write_report,
    )
    return EXIT_RESUMABLE if result is None else 0


def agent_range_test(job: Job) -> int:
    """Take part in a learning-rate range test; rank 0 writes its curve to the run folder."""
    return _run_probe(job, run_range_test)


def agent_noise_probe(job: Job) -> int:
    """Take part in measuring the gradient noise; rank 0 writes it to the run folder.

    Args:
        job: What is measured, in `job.last_step` steps.
    """
    assert job.last_step is not None
    return _run_probe(job, functools.partial(measure_noise, last_step=job.last_step))


def agent_size_probe(job: Job) -> int:
    """Take part in timing a micro-batch size; rank 0 writes the result to the run folder.

    Args:
        job: What is timed; `job.memory_bytes` limits the memory of each rank.
    """

    def measure(probe: ProbeContext) -> None:
        limit_memory(probe.backend.device, job.memory_bytes)
        time_micro_batch_size(probe)

    return _run_probe(job, measure)


def agent_loader_probe(job: Job) -> int:
    """Take part in timing how samples are read; rank 0 writes the result to the run folder.

    Args:
        job: What is timed, for `job.seconds` seconds.
    """
    assert job.seconds is not None
    return _run_probe(job, functools.partial(time_data_loading, seconds=job.seconds))


def agent_profile(job: Job) -> int:
    """Take part in profiling steps; each rank writes its trace, and rank 0 a summary.

    Args:
        job: What is profiled; the first `job.last_step` steps warm up and are not recorded.
    """
    assert job.last_step is not None
    return _run_probe(job, functools.partial(profile_steps, warm_up=job.last_step))


def _run_probe(job: Job, measure: Callable[[ProbeContext], None]) -> int:
    """Call `measure` as one rank of `job`; return the exit code."""

    def work(rank: _AgentRank) -> int:
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


def _run_agent_rank(job: Job, work: Callable[[_AgentRank], int]) -> int:
    """Form the process group as one rank of `job`, call `work`, and leave the group.

    The rank writes to its log, and rank 0 to the terminal as well. A failure is recorded in the run
    folder; the process that started the ranks shows the first one.

    Args:
        job: What is run.
        work: Called once the group is formed; returns the exit code.
    """
    stop = _listen_for_stop() if job.saves else None
    if stop is None:
        _let_signals_end_process()
    die_with_parent(job.launcher_pid)
    world = _find_world(job)
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
        watchdog = _start_watchdog(recipe, world, job.run_dir, stop or StopRequest(), output)
        backend, _ = join(recipe, job.plan, world, lambda: job.run_dir)
        _open_backends.append(backend)
        watchdog.usage = usage_of(backend.device)
        rank = _AgentRank(
            job=job,
            recipe=recipe,
            backend=backend,
            output=output,
            stop=stop,
            report_phase=watchdog.report_phase,
        )
        code = work(rank)
        backend.close()
        watchdog.close()
        # The agent sends SIGTERM if another rank still fails; nothing is left to save here.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        _exit_now(fail(error, world, job.run_dir, log=output.log, show=None, stop=stop))
    return code


def _find_world(job: Job) -> World:
    """Return this rank's place; each restart of a run has a rendezvous file of its own."""
    world = find_world()
    if job.rendezvous_folder is None:
        return world
    num_restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return replace(world, store=job.rendezvous_folder / f"ranks{num_restarts}")


def _listen_for_stop() -> StopRequest:
    stop = StopRequest()
    stop.listen(interrupts=False)  # the process that started the ranks handles Ctrl-C
    return stop


def _let_signals_end_process() -> None:
    """Let stop signals end this process at once, because it has nothing to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _start_watchdog(
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


def _choose_start(job: Job) -> ResumeFrom | None:
    """Return where to start: a restarted run resumes from its newest checkpoint, if it has one."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and list_checkpoints(job.run_dir):
        return replace(job.start or ResumeFrom(), step=None, fall_back=True)
    return job.start


def agent_inspection(job: Job) -> None:
    """Inspect the recipe of `job` in this process, and write the result to the run folder."""
    _let_signals_end_process()
    die_with_parent(job.launcher_pid)
    output = open_output(job.run_dir.log(0), own_terminal=True, on_terminal=False)
    try:
        recipe = job.source.build()
        write_inspection(inspect_recipe(recipe, job.source), job.run_dir)
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        _exit_now(fail(error, World(), job.run_dir, log=output.log, show=None))


def agent_diagnostics(job: Job) -> None:
    """Test this rank and the communication with the others; rank 0 writes all results."""
    stop = StopRequest()
    _let_signals_end_process()
    die_with_parent(job.launcher_pid)
    world = _find_world(job)
    output = open_output(job.run_dir.log(world.rank), own_terminal=True, on_terminal=False)
    try:
        recipe = _diagnostics_recipe(job.plan)
        watchdog = _start_watchdog(recipe, world, job.run_dir, stop, output)
        watchdog.report_phase(0, "computing")
        diagnostics = _diagnose(job.plan, world, ())
        watchdog.close()
        if world.rank == 0:
            write_atomic(job.run_dir.diagnostics, msgspec.json.encode(diagnostics).decode())
    except Exception as error:  # noqa: BLE001  # whatever torch raises
        _exit_now(fail(error, world, job.run_dir, log=output.log, show=None, stop=stop))


def external_diagnostics(
    plan: Plan, world: World, node_findings: tuple[Finding, ...]
) -> list[RankDiagnostics] | None:
    """Test the rank that this process was started as.

    Args:
        plan: The plan for the world found.
        world: This process's place, as torchrun, accelerate or the user started it.
        node_findings: What this rank has already found out about its node.

    Returns:
        The diagnostics of all ranks on rank 0, None on the others.

    Raises:
        LauncherError: The ranks do not form the planned group, or fail.
    """
    faulthandler.dump_traceback_later(DIAGNOSTICS_TIMEOUT, exit=True)
    try:
        diagnostics = _diagnose(plan, world, node_findings)
    except LauncherError:
        raise
    except Exception as error:
        name = f"rank {world.rank} ({platform.node()})"
        raise TrainingError(f"{name} failed: {type(error).__name__}: {error}") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    return diagnostics if world.rank == 0 else None


def _diagnostics_recipe(plan: Plan) -> Recipe:
    return diagnostics_recipe(plan.world_size, plan.settings["device"])


def _diagnose(
    plan: Plan, world: World, node_findings: tuple[Finding, ...]
) -> list[RankDiagnostics]:
    started = time.perf_counter()
    # The run folder is not used, because nothing is trained.
    backend, _ = join(_diagnostics_recipe(plan), plan, world, lambda: RunDir(Path()))
    _open_backends.append(backend)
    rendezvous_seconds = time.perf_counter() - started
    diagnostics = backend.gather(diagnose_rank(backend, rendezvous_seconds, node_findings))
    backend.close()
    return diagnostics


def external_count(world: World, count: Callable[[], int], *, stop: StopRequest) -> int:
    """Return what `count` returns on the first rank of this node, the only rank that calls it.

    If all ranks read the data at once, all would download it.

    Args:
        world: This process's place, as torchrun, accelerate or the user started it.
        count: Reads the data and returns a number.
        stop: Records the signals that ask this process to stop.

    Raises:
        WorldError: The ranks cannot reach each other.
        LostRankError: The first rank of the node failed.
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
    """Train as the rank that torchrun, accelerate or the user started this process as.

    Args:
        recipe: What to train.
        plan: The plan for the world found.
        world: This process's place.
        make_run_dir: Creates the run folder or opens the one to resume; called on rank 0 only.
        stop: Records the signals that ask this process to stop.
        start: Which checkpoint to resume from; None starts a new run.
        source: What the recipe is built from; spawned DataLoader workers need it.
        write_report: Writes the page that experiment trackers receive; None sends no page.

    Returns:
        The exit code of a single process. With several ranks, the function exits instead.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.threads_per_rank))
    with stop.ending_at_once() if world.world_size > 1 else contextlib.nullcontext():
        backend, run_dir = join(recipe, plan, world, make_run_dir)
    _open_backends.append(backend)
    output = open_output(run_dir.log(world.rank), own_terminal=False, on_terminal=True)
    try:
        watchdog = _start_watchdog(recipe, world, run_dir, stop, output)
        watchdog.usage = usage_of(backend.device)
        result = train_rank(
            recipe,
            plan,
            backend,
            run_dir,
            output,
            stop=stop,
            start=start,
            source=source,
            report_phase=watchdog.report_phase,
            write_report=write_report,
        )
        backend.close()
        watchdog.close()
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        _exit_now(fail(error, world, run_dir, log=output.log, show=output.errors, stop=stop))
    code = EXIT_RESUMABLE if result is None else 0
    if world.world_size > 1:
        # DDP keeps gloo's threads running after its group is destroyed (torch 2.13, also after a
        # garbage collection). A C++ thread that touches Python while the interpreter is finalized
        # aborts the process, so a finished run would exit with SIGABRT.
        atexit._run_exitfuncs()  # noqa: SLF001
        _exit_now(code)
    return code


def _exit_now(exit_code: int) -> None:
    """End this process without waiting for threads, or for peers that may be lost."""
    remove_semaphores()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
