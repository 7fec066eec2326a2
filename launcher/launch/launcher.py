"""From a plan to processes: PyTorch's elastic agent, and ranks that are forked from its process.

The agent's process imports what the ranks need, so a node pays for one import of torch however many
ranks it has. It computes nothing and starts no threads, so it can be forked. If the recipe's own
code has started threads in it, each rank is a new interpreter instead. The ranks of one node find
each other through a file in a private folder, so the agent listens on no port.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from launcher.console.failure import death_text, failure_text
from launcher.environment.machine import oom_kills, read_machine
from launcher.errors import (
    EXIT_FAILED,
    EXIT_RESUMABLE,
    EndedError,
    PeerError,
    RunDirError,
    TrainingError,
)
from launcher.forking import reason_not_to_fork
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.configs import deepspeed_environment, process_environment
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.failure_record import (
    Failure,
    RunFailedError,
    fallback_failure_path,
    find_failure,
    replace_failure,
)
from launcher.runs.job import Job
from launcher.runs.private_folder import private_folder
from launcher.runs.rundir import RunDir
from launcher.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from launcher.engine.ranks.rendezvous import NodeGroup

_AGENT_LOGGERS = ("torch.distributed.elastic", "torch.multiprocessing")

_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""With this variable, a library that counts GPUs while it is imported asks the driver (NVML)
instead of initialising CUDA, after which no rank could be forked."""

_launching = 0
"""Launches in progress in this process; forks outside of them keep their signal handlers."""


class _Calls(NamedTuple):
    """What is called while the ranks run."""

    watch: Callable[[RunDir], object] | None
    before_restart: Callable[[], object]
    while_running: Callable[[], object]

    def poll(self, run_dir: RunDir) -> None:
        """Call what is called many times a second."""
        self.while_running()
        if self.watch is not None:
            self.watch(run_dir)


def launch(
    job: Job,
    function: Callable[[Job], int | None] | None = None,
    *,
    signals: SignalHandler,
    rendezvous: NodeGroup | None = None,
    watch: Callable[[RunDir], object] | None = None,
    before_restart: Callable[[], object] = lambda: None,
    while_running: Callable[[], object] = lambda: None,
) -> int:
    """Run every rank of `job` on this machine and wait for them.

    No process is left behind, and the environment of this process is as it was.

    Args:
        job: The run.
        function: A function of `launcher.engine.worker` that each rank calls with the job; None
            trains.
        signals: Handles signals for the run.
        rendezvous: Connects this machine with the others of the run; None is one machine.
        watch: Called with the run folder many times a second while the ranks run. It shows what
            signals do, and this function prints nothing then.
        before_restart: Called before ranks that have failed are started again.
        while_running: Called many times a second while the ranks run; it shows nothing.

    Returns:
        0 if the run finished; `EXIT_RESUMABLE` if it was stopped and saved a checkpoint.

    Raises:
        RunFailedError: A rank of this machine failed or died.
        EndedError: SIGQUIT ended the run.
        PeerError: The run failed on another machine. If that machine disappeared and there is a
            checkpoint, the error's exit code is `EXIT_RESUMABLE`.
    """
    with contextlib.ExitStack() as stack, _forked_ranks_reset_signals():
        folder = _make_private_folder(stack)
        job = replace(job, private_folder=folder)
        if rendezvous is None:
            job = replace(job, rendezvous_folder=folder)
        with _environment([job.plan]):
            try:
                calls = _Calls(watch, before_restart, while_running)
                return _run_ranks(job, function, signals, rendezvous, folder, calls)
            except PeerError as error:
                if error.gone and list_checkpoints(job.run_dir):
                    error.exit_code = EXIT_RESUMABLE
                raise
            finally:
                gc.unfreeze()  # the calling program may continue, and free what it had before


def _make_private_folder(stack: contextlib.ExitStack) -> Path:
    """Make a folder for the run's temporary files, which is removed when `stack` is closed.

    Raises:
        TrainingError: The folder cannot be made.
    """
    try:
        return stack.enter_context(private_folder())
    except OSError as error:
        raise TrainingError(
            f"The ranks find each other in a temporary folder, and none can be made: {error}. Set "
            "TMPDIR to a writable folder on a disk of this machine."
        ) from None


def _run_ranks(
    job: Job,
    function: Callable[[Job], int | None] | None,
    signals: SignalHandler,
    rendezvous: NodeGroup | None,
    folder: Path,
    calls: _Calls,
) -> int:
    announces = calls.watch is None and (rendezvous is None or not rendezvous.is_quiet)
    signals.attach(job, announces=announces)
    oom_kills_before = oom_kills()
    reason_to_spawn = reason_not_to_fork()
    if reason_to_spawn is None:
        import_for([job.plan])
    elif announces and job.output_mode != "quiet":
        _warn_about_spawning(job.recipe, reason_to_spawn)
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from launcher.engine.ranks.agent import run_agent
    from launcher.engine.worker import agent_rank

    def poll() -> None:
        signals.raise_again()
        calls.poll(job.run_dir)

    _silence_agent()
    try:
        result = run_agent(
            function or agent_rank,
            job,
            folder,
            rendezvous,
            spawn=reason_to_spawn is not None,
            poll=poll,
            before_restart=calls.before_restart,
        )
    except SignalException as error:
        raise EndedError(signals.report(error.sigval)) from None
    if not result.failures:
        return max((code or 0 for code in result.return_values.values()), default=0)
    oom_kills_after = oom_kills()
    killed_for_memory = (
        None
        if oom_kills_before is None or oom_kills_after is None
        else oom_kills_after - oom_kills_before
    )
    raise _failure(result.failures, job, rendezvous, folder, killed_for_memory)


def import_for(plans: Sequence[Plan]) -> None:
    """Import what the agents and ranks of `plans` need, so that forked ones find it imported."""
    strategies = [STRATEGIES[plan.strategy] for plan in plans]
    modules = [
        "launcher.engine.ranks.agent",
        "launcher.engine.worker",
        "torch._dynamo",  # every optimizer imports it
    ]
    if any(plan.backend != "local" for plan in plans):
        modules.append("launcher.engine.backends.accelerate")
        modules.append("torch.distributed.algorithms.ddp_comm_hooks")  # by Accelerate for DDP
    if any(strategy.uses_fsdp for strategy in strategies):
        modules += ["torch.distributed.fsdp", "launcher.engine.backends.fsdp"]
    on_cpus = all(plan.device == "cpu" for plan in plans)
    if on_cpus and any(strategy.uses_deepspeed for strategy in strategies):
        # Importing DeepSpeed initialises CUDA, after which no rank could be forked.
        modules.append("launcher.engine.backends.deepspeed")
    with _environment(plans), _garbage_collection_paused():
        for module in modules:
            importlib.import_module(module)


def import_for_any() -> None:
    """Import what the ranks of most plans need, for a server that forks commands.

    DeepSpeed is left out where there is a GPU: importing it would initialise CUDA.
    """
    modules = [
        "launcher.engine.worker",
        "launcher.engine.ranks.agent",
        "torch._dynamo",
        "launcher.engine.backends.accelerate",
        "torch.distributed.fsdp",
        "launcher.engine.backends.fsdp",
    ]
    machine, variables = read_machine(), {_NVML_CHECK: "1"}
    if machine.has_deepspeed and not machine.num_gpus:
        modules.append("launcher.engine.backends.deepspeed")
        variables |= deepspeed_environment("cpu")
    with _environment([], variables), _garbage_collection_paused():
        for module in modules:
            importlib.import_module(module)


@contextlib.contextmanager
def _environment(
    plans: Sequence[Plan], variables: Mapping[str, str] = MappingProxyType({})
) -> Iterator[None]:
    """Set the environment variables that the ranks of `plans` inherit, and restore them.

    Args:
        plans: The plans.
        variables: Further variables.
    """
    values = {
        **variables,
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",  # SignalHandler handles the others
        "TORCH_ELASTIC_WORKER_IDENTICAL": "1",  # nodes know the numbers of their ranks
    }
    for plan in plans:
        values |= process_environment(plan)
    if any(plan.device == "cuda" for plan in plans):
        values[_NVML_CHECK] = "1"
    if _NVML_CHECK in os.environ:  # by the user
        values.pop(_NVML_CHECK, None)
    previous = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@functools.cache
def _warn_about_spawning(recipe: str, reason: str) -> None:
    print(
        f"launcher: the ranks cannot be forked from this process: {recipe}, or the program that "
        f"runs it, has {reason}. Each rank starts as a new interpreter and imports everything "
        "itself. Import torch and start threads inside the recipe's functions: runs then start "
        "faster.",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause garbage collection, which would take a fifth of the time of the imports.

    Imported objects are frozen afterwards: no later collection visits them, here or in the ranks,
    so their memory pages stay shared.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _forked_ranks_reset_signals() -> Iterator[None]:
    """Let ranks that are forked in this context start with default signal handlers.

    Ranks block the signals until they install handlers of their own.
    """
    global _launching  # noqa: PLW0603  # the hooks of os.register_at_fork cannot be removed
    _register_fork_hooks(os.getpid())
    _launching += 1
    try:
        yield
    finally:
        _launching -= 1


@functools.cache
def _register_fork_hooks(launcher_pid: int) -> None:
    blocked = {signal.SIGINT, *STOP_SIGNALS}

    def before() -> None:
        if _launching and os.getpid() == launcher_pid:
            signal.pthread_sigmask(signal.SIG_BLOCK, blocked)

    def after_in_parent() -> None:
        if _launching and os.getpid() == launcher_pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    def after_in_child() -> None:
        if not _launching or os.getppid() != launcher_pid:  # not a rank
            return
        for number in (*STOP_SIGNALS, signal.SIGALRM, signal.SIGQUIT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    os.register_at_fork(
        before=before, after_in_parent=after_in_parent, after_in_child=after_in_child
    )


def _failure(
    failures: Mapping[int, ProcessFailure],
    job: Job,
    rendezvous: NodeGroup | None,
    folder: Path,
    killed_for_memory: int | None,
) -> RunFailedError:
    """Return the error for the first failed rank; record the death of one that could not.

    Raises:
        PeerError: Another node has failed first and reports it.
    """
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    rank_file = fallback_failure_path(folder, rank % job.plan.nproc_per_node)
    failure = find_failure(job.run_dir, rank_file)
    if rendezvous is not None and failure is not None:
        is_here = failure.rank // job.plan.nproc_per_node == rendezvous.index
        if not is_here or (failure.lost_peer and failure.rank == rank):
            rendezvous.check_peers(wait=True)
    if failure is None or failure.lost_peer:
        text = death_text(rank, first.exitcode, job.run_dir, oom_kills=killed_for_memory)
        failure = Failure(
            rank=rank,
            node=platform.node(),
            pid=first.pid,
            time=first.timestamp,
            error="Death",
            message=text.partition("\n")[0].removeprefix("launcher: the run failed: "),
            exit_code=EXIT_FAILED,
            out_of_memory=bool(killed_for_memory),
        )
        with contextlib.suppress(RunDirError):  # a full disk must not hide the failure
            replace_failure(job.run_dir, failure)
    else:
        text = failure_text(failure, job.run_dir)
    if rendezvous is not None:
        rendezvous.report(failure.exit_code)
    return RunFailedError(text.removeprefix("launcher: "), failure)


def _silence_agent() -> None:
    """Silence the agent's loggers, which repeat each failure with a traceback of the agent."""
    if "LOGLEVEL" in os.environ:
        return
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith(_AGENT_LOGGERS) and isinstance(logger, logging.Logger):
            logger.setLevel(logging.CRITICAL + 1)
