"""One round of a run that restarts: the nodes that start ranks together, until one fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from launcher.engine.ranks.launcher_store import LauncherStore, connect_store, open_store
from launcher.engine.ranks.meeting import Meeting
from launcher.engine.ranks.round_messages import Start
from launcher.environment.nodes import Nodes
from launcher.errors import PeerError

_POLL_SECONDS = 0.1


class RoundStores:
    """The stores of the rounds that this launcher has held: a new one each time, at a free port.

    Args:
        nodes: The nodes of the run.
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._newest: LauncherStore | None = None
        self._taken: LauncherStore | None = None

    def open(self) -> int:
        """Open the store of a new round on this node; return its port."""
        self._newest = open_store(
            0, seconds=self._nodes.node_timeout, timeout=self._nodes.join_timeout
        )
        return self._newest.port

    def take(self) -> LauncherStore:
        """Return the store that was opened last; those of earlier rounds are closed."""
        assert self._newest is not None
        if self._taken is not None:
            self._taken.close()
        self._taken, self._newest = self._newest, None
        return self._taken

    def close(self) -> None:
        """Close the stores that are open, at the end of the run."""
        for store in (self._taken, self._newest):
            if store is not None:
                store.close()


class RoundGroup:
    """The nodes of one round, as one of them sees the others.

    Args:
        meeting: The meeting of all launchers.
        start: What the host has said about this round.
        stores: The stores that this launcher has opened.

    Raises:
        PeerError: The host is gone.
    """

    def __init__(self, meeting: Meeting, start: Start, stores: RoundStores) -> None:
        assert start.index is not None
        self.index, self.count, self._meeting = start.index, start.count, meeting
        self.address = (meeting.host_address, start.port)
        self.names: Sequence[str] = _Names(meeting, start.index)
        if meeting.is_host:
            self.store = stores.take()
            return
        seconds = meeting.nodes.node_timeout
        try:
            store = connect_store(*self.address, seconds)
            store.set_timeout(timedelta(seconds=meeting.nodes.join_timeout))
        except RuntimeError as error:
            raise PeerError(meeting.host_name, None) from error
        self.store = LauncherStore(store, seconds=seconds)

    @property
    def is_quiet(self) -> bool:
        """Whether this node stays quiet, because the first node prints to the same output."""
        return self.index > 0 and bool(self._meeting.nodes.names)

    def share(self, make: Callable[[], str]) -> str:
        """Call `make` on the first node; return its result on every node (collective).

        Raises:
            LauncherError: The error that `make` raised on the first node; PeerError on the others.
        """
        if self.index == 0:
            path = make()
            self._meeting.announce_folder(path)
            return path
        return self._meeting.wait_for_folder()

    def check_peers(self, *, wait: bool = False) -> None:
        """Take what the others have told.

        Args:
            wait: Whether to keep checking until a lost node is certain to have been noticed.

        Raises:
            PeerError: This round is over.
        """
        deadline = time.monotonic() + (self._meeting.nodes.node_timeout if wait else 0)
        while True:
            self._meeting.check()
            if time.monotonic() >= deadline:
                return
            time.sleep(_POLL_SECONDS)

    def wait_for_ranks(self) -> None:
        """Return at once: the launchers wait for each other when they leave the meeting."""

    def report(self, exit_code: int) -> None:
        """Tell the other nodes that the ranks of this one have failed."""
        self._meeting.fail(exit_code)

    def leave(self, exit_code: int) -> int:
        """Leave the meeting when the run has ended; return its exit code.

        Raises:
            PeerError: Another node has failed meanwhile.
        """
        self._meeting.finish(exit_code)
        return exit_code


class _Names(Sequence[str]):
    """The names of the nodes of a round, of which a launcher knows its own and the host's."""

    def __init__(self, meeting: Meeting, index: int) -> None:
        self._known = {0: meeting.host_name, index: meeting.name}

    def __len__(self) -> int:
        return 1 + max(self._known)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        return self._known.get(index, f"node {index}")
