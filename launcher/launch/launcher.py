"""From a plan to processes: PyTorch's elastic agent, and ranks that are forked from its process.

That process has imported what the ranks need, so a node pays for one import of torch whatever the
number of its ranks. It computes nothing and starts no threads of its own, and so can be forked.
Where the recipe's own code has started threads in it, each rank is a new interpreter instead. The
ranks find each other in a file of a private folder, and the agent listens on no port.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import logging
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.console.failure import death_text, failure_text
from launcher.environment.machine import oom_kills
from launcher.errors import EXIT_FAILED, EXIT_RESUMABLE, PeerError, RunDirError, TrainingError
from launcher.forking import reason_not_to_fork
from launcher.planning.configs import process_environment
from launcher.planning.plan import Plan
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.failure_record import (
    Failure,
    failure_of_rank,
    find_failure,
    replace_failure,
)
from launcher.runs.heartbeat import PHASES, read_heartbeat
from launcher.runs.job import Job
from launcher.signals import EXIT_BY_SIGNAL, STOP_SIGNALS

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from launcher.engine.ranks.rendezvous import Rendezvous

_AGENT_LOGGERS = ("torch.distributed.elastic", "torch.multiprocessing")

_SECONDS_BETWEEN_LOOKS = 0.1


def launch(
    job: Job,
    function: Callable[[Job], int | None] | None = None,
    *,
    signals: SignalHandler | None = None,
    rendezvous: Rendezvous | None = None,
    show: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> int:
    """Run every rank of `job` on this machine; return the exit code of the run.

    The first failure is shown once, last, on the node where it happened, and no process is left
    behind.

    Args:
        job: What to run.
        function: What each rank calls with it, of `launcher.engine.worker`; None trains.
        signals: What has been listening for signals; None begins to now.
        rendezvous: With the other machines of the run; None is alone.
        show: Is given the text of the failure; by default it prints to stderr.

    Raises:
        PeerError: The run has failed on another machine. Where that has gone, and there is a
            checkpoint to go on from, its exit code says so.
    """
    with _private_folder() as folder:
        if rendezvous is None:
            job = replace(job, meeting_place=folder)
        try:
            return _start_ranks(job, function, signals or SignalHandler(), rendezvous, folder, show)
        except PeerError as error:
            if error.gone and list_checkpoints(job.run_dir):
                error.exit_code = EXIT_RESUMABLE
            raise


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """Make a folder on a local disk that nobody else may look into, for as long as the run takes.

    Raises:
        TrainingError: It cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="launcher-"))
    except OSError as error:
        raise TrainingError(
            f"The ranks find each other in a temporary folder, and none can be made: {error}. Set "
            "TMPDIR to a folder on a disk of this machine that can be written."
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_ranks(
    job: Job,
    function: Callable[[Job], int | None] | None,
    signals: SignalHandler,
    rendezvous: Rendezvous | None,
    folder: Path,
    show: Callable[[str], None],
) -> int:
    aloud = rendezvous is None or not rendezvous.is_echo
    signals.attend(job, folder, aloud=aloud)
    before = oom_kills()
    reason = reason_not_to_fork()
    if reason is None:
        import_for([job.plan])
    else:
        _prepare_to_spawn(job, reason if aloud else None)
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from launcher.engine.ranks.agent import run_agent
    from launcher.engine.worker import agent_rank

    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours
    _quieten_the_agent()
    try:
        ranks_do = function or agent_rank
        result = run_agent(ranks_do, job, folder, rendezvous, afresh=reason is not None)
    except SignalException as error:
        return _say_stopped(error.sigval)
    if not result.failures:
        return max((code or 0 for code in result.return_values.values()), default=0)
    after = oom_kills()
    killed = None if before is None or after is None else after - before
    return _tell(result.failures, job, rendezvous, folder, killed, show)


def import_for(plans: Sequence[Plan]) -> None:
    """Import what the ranks of `plans` need, so that each finds it there."""
    backends = {plan.backend for plan in plans}
    _set_environment(plans)
    modules = ["launcher.engine.worker", "torch._dynamo"]  # which every optimizer imports
    if backends - {"local"}:
        modules.append("launcher.engine.backends.accelerate")
    if "fsdp" in backends:
        modules.append("torch.distributed.fsdp")
    if "deepspeed" in backends and all(plan.device == "cpu" for plan in plans):
        # It asks CUDA for its devices while it is imported, and no rank could be forked after that.
        modules.append("launcher.engine.backends.deepspeed")
    with _uncollected():
        for module in modules:
            importlib.import_module(module)
    _forget_signals_in_ranks()


def _set_environment(plans: Sequence[Plan]) -> None:
    for plan in plans:
        os.environ.update(process_environment(plan))
    if any(plan.device == "cuda" for plan in plans):
        # Whoever asks for GPUs while being imported asks the driver, and does not start CUDA: ranks
        # that are forked from a process in which it runs could not use it.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def _prepare_to_spawn(job: Job, reason: str | None) -> None:
    """Prepare for ranks that import everything themselves; say why, once, where there is one."""
    _set_environment([job.plan])
    if reason is not None:
        _tell_of_spawning(job.recipe, reason)


@functools.cache
def _tell_of_spawning(recipe: str, reason: str) -> None:
    print(
        f"launcher: importing {recipe} has {reason} in this process, and no rank can be forked "
        "from it: each rank starts afresh and imports everything itself. Import torch and start "
        "threads inside the recipe's functions: runs then start faster.",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Spare what is imported the garbage collector, which takes a fifth of the time looking at it.

    Nor does it look again, here or in the ranks, whose pages of it stay shared.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@functools.cache
def _forget_signals_in_ranks() -> None:
    """Have ranks begin without the handlers of this process, and deaf until they have their own."""
    launcher = os.getpid()
    mask = {signal.SIGINT, *STOP_SIGNALS}

    def forking() -> None:
        if os.getpid() == launcher:
            signal.pthread_sigmask(signal.SIG_BLOCK, mask)

    def forked() -> None:
        if os.getpid() == launcher:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, mask)

    def born() -> None:
        if os.getppid() != launcher:  # a rank's own child
            return
        for number in (*STOP_SIGNALS, signal.SIGALRM, signal.SIGQUIT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    os.register_at_fork(before=forking, after_in_parent=forked, after_in_child=born)


class SignalHandler:
    """Handles what asks a run to stop, at whatever point of it that comes.

    The ranks are told, and stop at a step with a checkpoint. Ctrl-C ends what has taken no step
    yet, and the second time everything, at once; any of them ends a job that saves nothing.
    """

    def __init__(self) -> None:
        self._job: Job | None = None
        self._folder: Path | None = None
        self._aloud = True
        self._interrupted = False
        self._told = False
        signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGALRM, self._tell_the_ranks)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._stop)

    def attend(self, job: Job, folder: Path, *, aloud: bool) -> None:
        """Handle them for this run, which has a folder of its own, those included that came."""
        self._job, self._folder, self._aloud = job, folder, aloud
        if self._told:
            self._tell_the_ranks()

    def _interrupt(self, *_: object) -> None:
        if self._interrupted or not self._has_begun():
            self._end(signal.SIGINT)
        self._interrupted = True
        self._stop(signal.SIGINT)

    def _end(self, number: signal.Signals) -> None:
        """End everything at once, without an exception, which an import could swallow."""
        for rank in multiprocessing.active_children():
            rank.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(_say_stopped(number))

    def _stop(self, number: int, *_: object) -> None:
        if self._job is not None and not self._job.saves:
            self._end(signal.Signals(number))
        if not self._told:
            self._told = True
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            if self._aloud:
                os.write(2, f"\nlauncher: {name}: stopping after this step{again}\n".encode())
        self._tell_the_ranks()

    def _has_begun(self) -> bool:
        """Return whether there may be steps to lose."""
        if self._job is None or not self._job.saves or not multiprocessing.active_children():
            return False
        health = read_heartbeat(self._job.run_dir, 0)
        return health is not None and health.phase != PHASES[0]

    def _tell_the_ranks(self, *_: object) -> None:
        if self._job is None:
            return
        ranks = multiprocessing.active_children()
        if len(ranks) < self._job.plan.nproc_per_node:  # once all are there
            signal.setitimer(signal.ITIMER_REAL, _SECONDS_BETWEEN_LOOKS)
            return
        for rank in ranks:
            if rank.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGUSR1)


def _say_stopped(number: signal.Signals) -> int:
    os.write(2, f"\nlauncher: stopped by {number.name}\n".encode())
    return EXIT_BY_SIGNAL + number


def _tell(
    failures: Mapping[int, ProcessFailure],
    job: Job,
    rendezvous: Rendezvous | None,
    folder: Path,
    killed_for_memory: int | None,
    show: Callable[[str], None],
) -> int:
    """Show the failure of a rank, or record and show the end of one that had no time to.

    Raises:
        PeerError: That is for another node to do.
    """
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    left = failure_of_rank(folder, rank % job.plan.nproc_per_node)
    failure = find_failure(job.run_dir, left)
    if rendezvous is not None and failure is not None:
        here = failure.rank // job.plan.nproc_per_node == rendezvous.index
        if not here or (failure.lost_peer and failure.rank == rank):
            rendezvous.check_peers(patiently=True)
    if failure is None or failure.lost_peer:
        text = death_text(rank, first.exitcode, job.run_dir, oom_kills=killed_for_memory)
        failure = Failure(
            rank=rank,
            node=platform.node(),
            pid=first.pid,
            time=first.timestamp,
            error="Death",
            message=text.partition("\n")[0].removeprefix("launcher: "),
            exit_code=EXIT_FAILED,
            out_of_memory=bool(killed_for_memory),
        )
        with contextlib.suppress(RunDirError):  # on a full disk it is shown at least
            replace_failure(job.run_dir, failure)
    else:
        text = failure_text(failure, job.run_dir)
    if rendezvous is not None:
        rendezvous.report(failure.exit_code)
    show(text)
    return failure.exit_code


def _quieten_the_agent() -> None:
    """Leave the words to us: the agent's own errors repeat them, with its own traceback."""
    if "LOGLEVEL" in os.environ:
        return
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith(_AGENT_LOGGERS) and isinstance(logger, logging.Logger):
            logger.setLevel(logging.CRITICAL + 1)
