"""What the elastic agent of a run on one machine has in place of its own: no port, and no logs."""

from __future__ import annotations

from pathlib import Path

from torch._C._distributed_c10d import HashStore
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

ONE_MACHINE = "launcher-one-machine"
"""The name of this rendezvous, for `LaunchConfig(rdzv_backend=...)`."""


class OneMachine(RendezvousHandler):
    """The rendezvous of an agent that is alone: there is nobody to wait for or to listen to.

    The agent's store is in its own memory. The ranks find each other in a file of theirs.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._closed = False

    def get_backend(self) -> str:
        return ONE_MACHINE

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        nowhere = RendezvousStoreInfo("localhost", 0)
        return RendezvousInfo(HashStore(), rank=0, world_size=1, bootstrap_store_info=nowhere)

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def shutdown(self) -> bool:
        return True


def register_one_machine() -> None:
    """Have the agent know the name."""
    rendezvous_handler_registry.register(ONE_MACHINE, OneMachine)


class NoLogs(LogsSpecs):
    """No redirects and no tees: each rank opens its own log. The agent insists on error files.

    Args:
        folder: Where these are.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
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
