"""PyTorch's elastic agent over nodes that know each other already: no rendezvous, and no logs."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from launcher.engine.ranks.rendezvous import Rendezvous
from launcher.forking import without_main_module
from launcher.runs.failure_record import FAILURE_FILE, failure_of_rank
from launcher.runs.job import Job
from launcher.signals import deaf

_SECONDS_BETWEEN_LOOKS = 0.05
"""At the ranks; a run ends two looks after they do."""


def run_agent(
    function: Callable[[Job], int | None],
    job: Job,
    folder: Path,
    rendezvous: Rendezvous | None,
    *,
    afresh: bool = False,
) -> RunResult:
    """Call `function` in each of this node's ranks, and watch them.

    Args:
        function: What each rank calls.
        job: With what.
        folder: For the agent's own files.
        rendezvous: With the other nodes; None is alone, and listens on no port.
        afresh: Whether each rank is a new interpreter instead of a fork of this process.

    Raises:
        PeerError: Another node has failed or gone; the ranks of this one have been ended.
    """
    spec = WorkerSpec(
        role="default",
        local_world_size=job.plan.nproc_per_node,
        entrypoint=function,
        args=(job,),
        rdzv_handler=StaticRendezvousHandler(rendezvous),
        max_restarts=job.restarts,
        monitor_interval=_SECONDS_BETWEEN_LOOKS,
    )
    if afresh:
        return _ForkingAgent(spec, logs_specs=NoLogsSpecs(folder), start_method="spawn").run()
    return LocalElasticAgent(spec, logs_specs=NoLogsSpecs(folder), start_method="fork").run()


class _ForkingAgent(LocalElasticAgent):
    """Starts ranks as new interpreters, which are deaf to signals until they have handlers."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        resource_tracker.ensure_running()  # which would have this process hear SIGTERM again
        with without_main_module(), deaf():
            return super()._start_workers(worker_group)


class StaticRendezvousHandler(RendezvousHandler):
    """The rendezvous of nodes that have met, or of one that is alone."""

    def __init__(self, rendezvous: Rendezvous | None) -> None:
        self._rendezvous = rendezvous

    def get_backend(self) -> str:
        return "settled"

    def get_run_id(self) -> str:
        return "run"

    @property
    def use_agent_store(self) -> bool:
        """Whether the ranks of several nodes meet at our store, rather than on a port of theirs."""
        return self._rendezvous is not None

    def next_rendezvous(self) -> RendezvousInfo:
        store: Store
        if self._rendezvous is None:
            # In this process's own memory; the ranks find each other in a file of theirs.
            store, rank, nodes, address = HashStore(), 0, 1, ("localhost", 0)
        else:
            store = PrefixStore("agents", self._rendezvous.store)
            rank, nodes, address = (
                self._rendezvous.index,
                self._rendezvous.count,
                self._rendezvous.address,
            )
        where = RendezvousStoreInfo(*address)
        return RendezvousInfo(store, rank=rank, world_size=nodes, bootstrap_store_info=where)

    def num_nodes_waiting(self) -> int:
        """Return 0: nobody joins. The agent asks each time that it has looked after its ranks."""
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
    """No redirects and no tees: each rank opens its own log. The agent insists on error files.

    Args:
        folder: Where these are.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for rank, env in envs.items():
            env[FAILURE_FILE] = str(failure_of_rank(self._folder, rank))
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
