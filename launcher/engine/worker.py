"""Entry points of ranks that the elastic agent starts: those of `launcher run` and of the finders.

The agent calls one `agent_*` function in each process. `launcher.engine.external` has the entry
points of ranks that another launcher starts.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from launcher.engine.backends.base import Backend
from launcher.engine.probes.inspection import inspect_recipe, write_inspection
from launcher.engine.probes.layer_split import check_layer_split
from launcher.engine.probes.lr_trainings import run_lr_trainings
from launcher.engine.probes.measuring import (
    ProbeContext,
    limited_memory,
    measure_noise,
    run_range_test,
    time_data_loading,
    time_micro_batch_size,
    time_strategy,
)
from launcher.engine.probes.model_memory import measure_memory, write_memory
from launcher.engine.probes.profiling import profile_steps
from launcher.engine.process_group import join
from launcher.engine.rank_process import (
    diagnose,
    exit_now,
    keep_open,
    plan_diagnostics_recipe,
    report_binding,
    start_watchdog,
    temporary_files,
)
from launcher.engine.ranks import debugger
from launcher.engine.ranks.failures import fail
from launcher.engine.ranks.output import Output, open_output
from launcher.engine.ranks.processes import die_with_parent
from launcher.engine.ranks.temporary_files import sockets_in
from launcher.engine.ranks.usage import usage_of
from launcher.engine.run import train_rank
from launcher.engine.training.finished_run import evaluate_weights
from launcher.engine.training.prediction import predict_samples
from launcher.environment.world import World, find_world
from launcher.errors import EXIT_RESUMABLE
from launcher.recipe.recipe import Recipe
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.evaluation_result import write_measured
from launcher.runs.events import record_event
from launcher.runs.files import write_atomic
from launcher.runs.heartbeat import PHASES
from launcher.runs.job import Job, ResumeFrom
from launcher.signals import STOP_SIGNALS, StopRequest


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
        pause_after=rank.job.pause_after,
        trial=rank.job.trial,
        source=rank.job.source,
        started=rank.job.started,
        report_phase=_recording_recovery(rank),
        write_report=rank.job.write_report,
        is_restart=_num_restarts() > 0 or rank.job.attempt > 0,
    )
    return EXIT_RESUMABLE if result is None else 0


def _recording_recovery(rank: _AgentRank) -> Callable[[int, str], None]:
    """Return `report_phase`, which on rank 0 also records the first step after a restart."""
    loss = rank.job.loss
    if loss is None or rank.backend.rank > 0:
        return rank.report_phase
    first_step: int | None = None
    is_recorded = False

    def report(step: int, phase: str) -> None:
        nonlocal first_step, is_recorded
        rank.report_phase(step, phase)
        if is_recorded or phase == PHASES[0]:
            return
        first_step = step if first_step is None else first_step
        if step > first_step:
            is_recorded = True
            record_event(
                rank.job.run_dir,
                "recovered",
                step=step,
                seconds=time.time() - loss.time,
                node=loss.node,
                cause=loss.cause,
                nodes=rank.job.plan.nodes,
            )

    return report


def agent_range_test(job: Job) -> int:
    """Take part in a learning-rate range test; rank 0 writes its curve to the run folder."""
    return _run_probe(job, run_range_test)


def agent_lr_trainings(job: Job) -> int:
    """Take part in short trainings at several learning rates; rank 0 writes the outcomes."""
    return _run_probe(job, run_lr_trainings)


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
        with limited_memory(probe.backend.device, job.memory_bytes):
            time_micro_batch_size(probe)

    return _run_probe(job, measure)


def agent_strategy_probe(job: Job) -> int:
    """Take part in timing a strategy; rank 0 writes the result to the run folder.

    Args:
        job: What is timed; `job.memory_bytes` limits the memory of each rank on a GPU.
    """

    def measure(probe: ProbeContext) -> None:
        device = probe.backend.device
        with limited_memory(device, None if device.type == "cpu" else job.memory_bytes):
            time_strategy(probe)

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


def agent_evaluation(job: Job) -> int:
    """Take part in evaluating the weights of a run; rank 0 writes the metrics to the job's folder.

    Args:
        job: What is evaluated: `job.weights`.
    """
    weights = job.weights
    assert weights is not None

    def work(rank: _AgentRank) -> int:
        metrics = evaluate_weights(
            rank.recipe,
            job.plan,
            rank.backend,
            weights,
            source=job.source,
            report_phase=rank.report_phase,
        )
        if rank.backend.rank == 0:
            write_measured(job.run_dir, metrics)
        return 0

    return _run_agent_rank(job, work)


def agent_prediction(job: Job) -> int:
    """Take part in predicting; each rank writes its part.

    Args:
        job: What is predicted: `job.prediction`, with `job.weights`.
    """
    weights, prediction = job.weights, job.prediction
    assert weights is not None
    assert prediction is not None

    def work(rank: _AgentRank) -> int:
        predict_samples(
            rank.recipe,
            job.plan,
            rank.backend,
            weights,
            prediction,
            source=job.source,
            report_phase=rank.report_phase,
        )
        return 0

    return _run_agent_rank(job, work)


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
    if job.private_folder is not None:
        temporary_files.enter_context(sockets_in(job.private_folder))
    world = _find_world(job)
    output = open_output(
        job.run_dir.log(world.rank),
        own_terminal=True,
        on_terminal=world.rank == 0,
        output_mode=job.output_mode,
    )
    try:
        if job.private_folder is not None:
            debugger.install(
                job.private_folder, world.rank, report=output.errors.write, log=output.log
            )
        if job.folder is not None:
            os.chdir(job.folder)
        recipe = job.source.build()
        os.environ.setdefault("OMP_NUM_THREADS", str(job.plan.threads_per_rank))
        watchdog = start_watchdog(recipe, world, job.run_dir, stop or StopRequest(), output)
        report = functools.partial(watchdog.report_phase, 0, PHASES[0])
        backend, _ = join(recipe, job.plan, world, lambda: job.run_dir, report=report)
        report()
        keep_open(backend)
        watchdog.usage = usage_of(backend.device)
        report_binding(backend, output)
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
    except BaseException as error:  # noqa: BLE001  # whatever the recipe's own code raises
        exit_now(fail(error, world, job.run_dir, output=output, shows=False, stop=stop))
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


def _num_restarts() -> int:
    """Return how often the ranks have been started before."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _choose_start(job: Job) -> ResumeFrom | None:
    """Return where to start: a restarted run resumes from its newest checkpoint, if it has one.

    After a restart of several nodes the launchers have agreed on it.
    """
    if _num_restarts() > job.attempt and list_checkpoints(job.run_dir):
        return replace(job.start or ResumeFrom(), step=None, fall_back=True, promotes=True)
    return job.start


def agent_inspection(job: Job) -> None:
    """Inspect the recipe of `job` in this process, and write the result to the run folder."""
    _examine(
        job,
        lambda recipe: write_inspection(inspect_recipe(recipe, job.plan, job.source), job.run_dir),
    )


def agent_model_memory(job: Job) -> None:
    """Measure the sizes of the model of `job` in this process; write them to the run folder."""
    _examine(
        job,
        lambda recipe: write_memory(measure_memory(recipe, job.plan, job.source), job.run_dir),
    )


def agent_layer_split(job: Job) -> None:
    """Refuse the recipe of `job` if tensor_parallel cannot split the layers of its model."""
    _examine(job, check_layer_split)


def _examine(job: Job, examine: Callable[[Recipe], None]) -> None:
    """Call `examine` with the recipe of `job` in this process, which is no rank."""
    _let_signals_end_process()
    die_with_parent(job.launcher_pid)
    if job.private_folder is not None:
        temporary_files.enter_context(sockets_in(job.private_folder))
    output = open_output(job.run_dir.log(0), own_terminal=True, on_terminal=False)
    try:
        examine(job.source.build())
    except BaseException as error:  # noqa: BLE001  # whatever the recipe's own code raises
        exit_now(fail(error, World(), job.run_dir, output=output, shows=False))


def agent_diagnostics(job: Job) -> None:
    """Test this rank and the communication with the others; rank 0 writes all results."""
    stop = StopRequest()
    _let_signals_end_process()
    die_with_parent(job.launcher_pid)
    if job.private_folder is not None:
        temporary_files.enter_context(sockets_in(job.private_folder))
    world = _find_world(job)
    output = open_output(job.run_dir.log(world.rank), own_terminal=True, on_terminal=False)
    try:
        recipe = plan_diagnostics_recipe(job.plan)
        watchdog = start_watchdog(recipe, world, job.run_dir, stop, output)
        report = functools.partial(watchdog.report_phase, 0, "computing")
        report()
        diagnostics = diagnose(job.plan, world, (), report)
        watchdog.close()
        if world.rank == 0:
            write_atomic(job.run_dir.diagnostics, msgspec.json.encode(diagnostics))
    except BaseException as error:  # noqa: BLE001  # whatever torch raises
        exit_now(fail(error, world, job.run_dir, output=output, shows=False, stop=stop))
