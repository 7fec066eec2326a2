"""From a plan to processes: PyTorch's elastic agent, over a server that has imported torch once.

Every rank is forked from that server, so N ranks cost one import of torch rather than N.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, resource_tracker
from typing import TYPE_CHECKING, NoReturn

from launcher.configs import process_environment
from launcher.errors import EXIT_FAILED
from launcher.job import Job
from launcher.plan import Plan
from launcher.report.failure import death_text, failure_text
from launcher.rundir import read_failure

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_AGENT_LOGGERS = ("torch.distributed.elastic", "torch.multiprocessing")

_SECONDS_TO_BE_KNOWN = 0.1

EXIT_BY_SIGNAL = 128
"""A run that is stopped by a signal exits with this and the signal's number, as in any shell."""


def launch(job: Job, function: Callable[[Job], None] | None = None) -> int:
    """Run every rank of `job` on this machine; return the exit code of the run.

    The first failure is shown once, last, on stderr, and no process is left behind.

    Args:
        job: What to run.
        function: What each rank calls with it, of `launcher.engine.worker`; None trains.
    """
    ctrl_c = _CtrlC(job.plan.nproc_per_node)
    signal.signal(signal.SIGINT, ctrl_c)
    start_server([job.plan])
    # While the server imports torch for the ranks, this process does for the agent.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from launcher.engine.agent_logs import NoLogs

    if function is None:
        from launcher.engine.worker import launched_rank as function

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.plan.nproc_per_node,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        start_method="forkserver",
        logs_specs=NoLogs(),
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",  # SIGINT is ours
    )
    _quieten_the_agent()
    try:
        elastic_launch(config, function)(job)
    except ChildFailedError as error:
        return _show(error, job)
    except SignalException as error:
        return _say_stopped(signal.SIGINT if ctrl_c.pressed else error.sigval)
    return 0


def start_server(plans: Sequence[Plan]) -> None:
    """Start the server that ranks are forked from; it begins to import what `plans` need."""
    backends = {plan.backend for plan in plans}
    for plan in plans:
        os.environ.update(process_environment(plan))
    modules = ["launcher.engine.worker"]
    if backends - {"local"}:
        modules.append("launcher.engine.backends.accelerate")
    if "fsdp" in backends:
        modules.append("torch.distributed.fsdp")
    if "deepspeed" in backends and all(plan.device == "cpu" for plan in plans):
        # It asks CUDA for its devices while it is imported, and no rank could be forked after that.
        modules.append("launcher.engine.backends.deepspeed")
    if len(plans) > 1:
        modules.append("torch._dynamo")  # the first optimizer imports it: for one run, no gain
    multiprocessing.set_forkserver_preload(modules)
    # Stopped early, we leave semaphores to Python's tracker process; its warning would be noise.
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    # The server lives and dies with us; Ctrl-C in the middle of its imports is not its business. It
    # inherits the mask, and starts the tracker first, which would take the mask away.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class _CtrlC:
    """Handles Ctrl-C at whatever point of a run it comes."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self.pressed = False

    def __call__(self, number: int, _: object) -> None:
        """Be pressed, or be called back by the timer."""
        ranks = multiprocessing.active_children()
        if not ranks or (number == signal.SIGINT and self.pressed):
            # Nothing to end yet, where an exception could be swallowed by what is being imported;
            # or pressed again, by someone who will not wait for the agent.
            for rank in ranks:
                rank.kill()
            os._exit(_say_stopped(signal.SIGINT))
        self.pressed = True
        # The agent knows the ranks, and can end them, shortly after the last one is started.
        all_started = len(ranks) == self._num_ranks
        signal.signal(signal.SIGALRM, _tell_the_agent if all_started else self)
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_BE_KNOWN)


def _tell_the_agent(*_: object) -> NoReturn:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    raise SignalException("stopped by Ctrl-C", signal.SIGTERM)


def _say_stopped(number: signal.Signals) -> int:
    os.write(2, f"\nlauncher: stopped by {number.name}\n".encode())
    return EXIT_BY_SIGNAL + number


def _show(error: ChildFailedError, job: Job) -> int:
    rank, first = min(error.failures.items(), key=lambda item: item[1].timestamp)
    failure = read_failure(job.run_dir)
    if failure is not None and not failure["lost_peer"]:
        print(failure_text(failure, job.run_dir), file=sys.stderr)
        return int(failure["exit_code"])
    print(death_text(rank, first.exitcode, job.run_dir), file=sys.stderr)
    return EXIT_FAILED


def _quieten_the_agent() -> None:
    """Leave the words to us: the agent's own errors repeat them, with its own traceback."""
    if "LOGLEVEL" in os.environ:
        return
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith(_AGENT_LOGGERS) and isinstance(logger, logging.Logger):
            logger.setLevel(logging.CRITICAL + 1)
