"""Entry points of ranks that torchrun, accelerate launch, deepspeed, srun or a user starts."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import platform
from collections.abc import Callable
from dataclasses import replace

from launcher.engine.probes.diagnostics_recipe import DIAGNOSTICS_TIMEOUT
from launcher.engine.process_group import join
from launcher.engine.rank_process import (
    diagnose,
    exit_now,
    keep_open,
    report_binding,
    start_watchdog,
    temporary_files,
)
from launcher.engine.ranks import debugger
from launcher.engine.ranks.external_store import open_store
from launcher.engine.ranks.failures import fail
from launcher.engine.ranks.output import open_output
from launcher.engine.ranks.temporary_files import sockets_in
from launcher.engine.ranks.turns import Turns
from launcher.engine.ranks.usage import usage_of
from launcher.engine.ranks.watchdog import Watchdog
from launcher.engine.run import train_rank
from launcher.environment.world import World
from launcher.errors import EXIT_RESUMABLE, EndedError, LauncherError, TrainingError
from launcher.findings import Finding, RankDiagnostics
from launcher.planning.plan import Plan
from launcher.printable import error_line
from launcher.recipe.recipe import Recipe
from launcher.runs.job import RecipeSource, ReportWriter, ResumeFrom
from launcher.runs.private_folder import private_folder
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest


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

    def restart_timeout() -> None:
        faulthandler.dump_traceback_later(DIAGNOSTICS_TIMEOUT, exit=True)

    restart_timeout()
    try:
        diagnostics = diagnose(plan, world, node_findings, restart_timeout)
    except (LauncherError, KeyboardInterrupt):
        raise
    except BaseException as error:
        name = f"rank {world.rank} ({platform.node()})"
        raise TrainingError(f"{name} failed: {error_line(error)}") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    return diagnostics if world.rank == 0 else None


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
    with stop.ends_at_once():
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
    started: float | None = None,
    write_report: ReportWriter | None = None,
    ends_process: bool = True,
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
        started: `time.monotonic()` at the start of the command; None is the start of training.
        write_report: Writes the page that experiment trackers receive; None sends no page.
        ends_process: Whether a failure ends this process, as it does on a rank; a notebook goes on.

    Returns:
        The exit code of a single process. With several ranks, the function exits instead.

    Raises:
        EndedError: The run failed, its error has been shown, and `ends_process` is false.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.threads_per_rank))
    with stop.ends_at_once() if world.world_size > 1 else contextlib.nullcontext():
        backend, run_dir = join(recipe, plan, world, make_run_dir)
    keep_open(backend)
    atexit.register(temporary_files.close)
    folder = None
    with contextlib.suppress(OSError):  # multiprocessing then makes a folder of its own
        folder = temporary_files.enter_context(private_folder())
        temporary_files.enter_context(sockets_in(folder))
    output = open_output(run_dir.log(world.rank), own_terminal=False, on_terminal=True)
    if ends_process and folder is not None:  # a notebook has a debugger of its own
        debugger.install(
            folder,
            world.rank,
            report=output.errors.write,
            log=output.log,
            opens_terminal=world.world_size > 1,
        )
    watchdog: Watchdog | None = None
    try:
        # A notebook's user may be in its debugger, and can interrupt a cell that hangs.
        watched = recipe if ends_process else replace(recipe, hang_timeout=None)
        watchdog = start_watchdog(watched, world, run_dir, stop, output)
        watchdog.usage = usage_of(backend.device)
        report_binding(backend, output)
        result = train_rank(
            recipe,
            plan,
            backend,
            run_dir,
            output,
            stop=stop,
            start=start,
            source=source,
            started=started,
            report_phase=watchdog.report_phase,
            write_report=write_report,
        )
        backend.close()
        watchdog.close()
    except BaseException as error:  # whatever the recipe's own code raises
        if isinstance(error, KeyboardInterrupt):
            raise
        code = fail(error, world, run_dir, output=output, shows=True, stop=stop)
        if ends_process:
            exit_now(code)
        if watchdog is not None:
            watchdog.close()
        raise EndedError(code) from None
    debugger.uninstall()
    code = EXIT_RESUMABLE if result is None else 0
    if world.world_size > 1:
        # DDP keeps gloo's threads running after its group is destroyed (torch 2.13, also after a
        # garbage collection). A C++ thread that touches Python while the interpreter is finalized
        # aborts the process, so a finished run would exit with SIGABRT.
        atexit._run_exitfuncs()  # noqa: SLF001
        exit_now(code)
    temporary_files.close()
    return code
