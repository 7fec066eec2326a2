"""PyTorch's elastic agent for the ranks of one node.

The launchers of all nodes have met before, so the agent performs no rendezvous of its own, and each
rank opens its own log, so it redirects no output.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import (
    LogsDest,
    LogsSpecs,
    MultiprocessContext,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from launcher.engine.ranks.rendezvous import NodeGroup
from launcher.forking import without_main_module
from launcher.runs.failure_record import FAILURE_FILE_VARIABLE, fallback_failure_path
from launcher.runs.job import Job
from launcher.signals import signals_blocked

_SECONDS_TO_STOP = 5
"""How long ranks that are stopped for a restart may take, before they are killed: a call of NCCL
may wait for a lost rank."""

_SECONDS_TO_SHUT_DOWN = 30
"""How long ranks may otherwise take to save a checkpoint and end, as in torch."""

_POLL_SECONDS = 0.05
"""Longest interval at which the agent checks its ranks, which it also does when one has ended."""

_SECONDS_BEFORE_WAIT = 0.001
"""How long the agent sleeps before each check, beside its wait for the ranks; not 0 for torch."""


def run_agent(
    function: Callable[[Job], int | None],
    job: Job,
    folder: Path,
    rendezvous: NodeGroup | None,
    *,
    spawn: bool = False,
    poll: Callable[[], object] = lambda: None,
    before_restart: Callable[[], object] = lambda: None,
) -> RunResult:
    """Start the ranks of this node, call `function` in each, and wait for them to end.

    Args:
        function: The function that each rank calls.
        job: Its argument.
        folder: Folder for the agent's own files.
        rendezvous: The rendezvous with the other nodes; None if this is the only one, in which
            case no port is opened.
        spawn: Whether each rank is spawned as a new interpreter instead of forked.
        poll: Called whenever the agent has checked its ranks.
        before_restart: Called when ranks have failed, before all are started again.

    Raises:
        PeerError: Another node has failed or disappeared; the ranks of this node have been ended.
    """
    spec = WorkerSpec(
        role="default",
        local_world_size=job.plan.nproc_per_node,
        entrypoint=function,
        args=(job,),
        rdzv_handler=StaticRendezvousHandler(rendezvous),
        max_restarts=job.attempt + job.restarts,  # the ranks see the difference to what is left
        monitor_interval=_SECONDS_BEFORE_WAIT,
    )
    kind = _SpawningAgent if spawn else _Agent
    agent = kind(spec, logs_specs=NoLogsSpecs(folder), start_method="spawn" if spawn else "fork")
    agent.poll, agent.before_restart = poll, before_restart
    agent.set_up(job, rendezvous)
    with contextlib.closing(agent):
        return agent.run()


class _Agent(LocalElasticAgent):
    """An agent that notices the end of a rank's process, whatever the rank has left running.

    multiprocessing waits for the end of a pipe that the rank holds open. A process that the rank
    has started inherits the pipe, and would hide the rank's end for as long as it runs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.poll: Callable[[], object] = lambda: None
        """Called whenever the agent has checked its ranks."""

        self.before_restart: Callable[[], object] = lambda: None
        """Called before the ranks are started again."""

        self._descriptors: list[int] = []
        """Descriptors of the ranks' processes (pidfd), which are ready once the process ends."""

    def set_up(self, job: Job, rendezvous: NodeGroup | None) -> None:
        """Prepare for one attempt of a job, with or without the agents of other nodes."""
        self._remaining_restarts = job.restarts
        if rendezvous is None:
            return
        # torch's own wait for the other agents neither notices their loss nor handles signals.
        self._exit_barrier = rendezvous.wait_for_ranks  # type: ignore[method-assign]
        if job.restarts_together:
            self._shutdown_timeout = _SECONDS_TO_STOP

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(timeout=self._shutdown_timeout)

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: float = _SECONDS_TO_SHUT_DOWN
    ) -> None:
        deadline = time.monotonic() + timeout
        self._end_ranks(death_sig, deadline)
        super()._shutdown(death_sig, max(deadline - time.monotonic(), 0))  # type: ignore[arg-type]

    def _end_ranks(self, number: signal.Signals, deadline: float) -> None:
        """Signal the ranks and wait for their ends; one that has a result is signalled once more.

        The signal makes ranks save a checkpoint. They then wait for the agent to take the results
        of all ranks, which it no longer does.
        """
        if not isinstance(self._pcontext, MultiprocessContext):
            return
        context = self._pcontext._pc  # noqa: SLF001
        ranks = dict(enumerate([] if context is None else context.processes))
        ranks = {local_rank: rank for local_rank, rank in ranks.items() if rank.is_alive()}
        waiting = set(ranks)
        for rank in ranks.values():
            _send_signal(rank, number)
        while ranks and time.monotonic() < deadline:
            for local_rank in tuple(waiting):
                if not self._pcontext._ret_vals[local_rank].empty():  # noqa: SLF001
                    waiting.remove(local_rank)
                    _send_signal(ranks[local_rank], number)
            wait([rank.sentinel for rank in ranks.values()], timeout=_POLL_SECONDS)
            ranks = {local_rank: rank for local_rank, rank in ranks.items() if rank.is_alive()}
            waiting &= set(ranks)

    def close(self) -> None:
        """Close the descriptors of processes that have ended."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self.before_restart()
        super()._restart_workers(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids = super()._start_workers(worker_group)
        with contextlib.suppress(OSError):  # Linux before 5.3
            self._watch_processes()
        return pids

    def _watch_processes(self) -> None:
        """Wait for the ranks' processes from now on, instead of for their pipes.

        Raises:
            OSError: The kernel has no descriptors of processes.
        """
        self.close()
        assert isinstance(self._pcontext, MultiprocessContext)
        context = self._pcontext._pc  # noqa: SLF001
        assert context is not None
        self._descriptors = [os.pidfd_open(process.pid) for process in context.processes]
        for descriptor, process in zip(self._descriptors, context.processes, strict=True):
            process._sentinel = process._popen.sentinel = descriptor  # noqa: SLF001
        context.sentinels = {
            descriptor: index for index, descriptor in enumerate(self._descriptors)
        }

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._wait_for_ranks()
        result = super()._monitor_workers(worker_group)
        self.poll()
        if result.state is not WorkerState.HEALTHY:
            return result
        failures = {
            worker_group.workers[local_rank].global_rank: failure
            for local_rank, failure in self._early_exits()
        }
        return RunResult(state=WorkerState.FAILED, failures=failures) if failures else result

    def _wait_for_ranks(self) -> None:
        """Wait until a rank has a result or has ended, for an interval at most."""
        assert isinstance(self._pcontext, MultiprocessContext)
        known = self._pcontext._return_values  # noqa: SLF001
        results = [
            queue._reader  # type: ignore[attr-defined]  # noqa: SLF001
            for local_rank, queue in self._pcontext._ret_vals.items()  # noqa: SLF001
            if local_rank not in known
        ]
        wait([*results, *self._descriptors], timeout=_POLL_SECONDS)

    def _early_exits(self) -> Iterator[tuple[int, ProcessFailure]]:
        """Yield the local ranks that have ended with exit code 0 and without a result.

        A rank that has a result waits for the agent to take those of all ranks.
        """
        assert isinstance(self._pcontext, MultiprocessContext)
        context = self._pcontext._pc  # noqa: SLF001
        assert context is not None
        for local_rank, process in enumerate(context.processes):
            if process.exitcode == 0:
                error_file = self._pcontext.error_files[local_rank]
                yield local_rank, ProcessFailure(local_rank, process.pid, 0, error_file)


def _send_signal(process: BaseProcess, number: signal.Signals) -> None:
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


class _SpawningAgent(_Agent):
    """An agent whose ranks are new interpreters that block signals until they install handlers."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # Inside `signals_blocked`, the resource tracker would unblock SIGTERM in this process.
        resource_tracker.ensure_running()
        with without_main_module(), signals_blocked():
            return super()._start_workers(worker_group)


class StaticRendezvousHandler(RendezvousHandler):
    """Tells the agent about nodes that have already met, or that this node is the only one."""

    def __init__(self, rendezvous: NodeGroup | None) -> None:
        self._rendezvous = rendezvous

    def get_backend(self) -> str:
        return "settled"

    def get_run_id(self) -> str:
        return "run"

    @property
    def use_agent_store(self) -> bool:
        """Whether the ranks meet at the launchers' store, as those of several nodes do."""
        return self._rendezvous is not None

    def next_rendezvous(self) -> RendezvousInfo:
        store: Store
        if self._rendezvous is None:
            # The agent's store is in memory; the ranks meet through a file in a private folder.
            store, rank, num_nodes, address = HashStore(), 0, 1, ("localhost", 0)
        else:
            store = PrefixStore("agents", self._rendezvous.store.store)
            rank, num_nodes, address = (
                self._rendezvous.index,
                self._rendezvous.count,
                self._rendezvous.address,
            )
        return RendezvousInfo(
            store,
            rank=rank,
            world_size=num_nodes,
            bootstrap_store_info=RendezvousStoreInfo(*address),
        )

    def num_nodes_waiting(self) -> int:
        """Return 0, because no node joins later, after checking the other nodes.

        The agent calls this every time it has checked its ranks.

        Raises:
            PeerError: Another node has failed or disappeared.
        """
        if self._rendezvous is not None:
            self._rendezvous.check_peers()
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def shutdown(self) -> bool:
        return True


class NoLogsSpecs(LogsSpecs):
    """Redirects no output: each rank opens its own log.

    The environment of each rank names the file for a failure that the run folder cannot hold.

    Args:
        folder: Folder for these files, and for the error files that the agent requires.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for rank, env in envs.items():
            env[FAILURE_FILE_VARIABLE] = str(fallback_failure_path(self._folder, rank))
        none = dict.fromkeys(envs, "")
        return LogsDest(
            stdouts=none,
            stderrs=dict(none),
            tee_stdouts={},
            tee_stderrs={},
            error_files={rank: str(self._folder / f"error{rank}.json") for rank in envs},
        )

    @property
    def root_log_dir(self) -> str:
        return ""
