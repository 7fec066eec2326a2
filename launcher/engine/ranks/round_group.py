"""One round of a run that restarts: the nodes that start ranks together, until one fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from launcher.engine.ranks.launcher_store import LauncherStore, connect_store
from launcher.engine.ranks.meeting import Meeting
from launcher.engine.ranks.round_messages import Start
from launcher.errors import PeerError

_POLL_SECONDS = 0.1


class RoundStores:
    """The stores of the rounds that this launcher has held: a new one each time, at a free port."""

    def __init__(self) -> None:
        self._newest: TCPStore | None = None

    def open(self) -> int:
        """Open the store of a new round on this node; return its port."""
        self._newest = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        return int(self._newest.port)

    def take(self) -> TCPStore:
        """Return the store that was opened last."""
        assert self._newest is not None
        store, self._newest = self._newest, None
        return store


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
        seconds = meeting.nodes.node_timeout
        if meeting.is_host:
            self.store = LauncherStore(stores.take(), seconds=seconds, is_served_here=True)
            return
        try:
            store = connect_store(*self.address, seconds)
            store.set_timeout(timedelta(seconds=meeting.nodes.join_timeout))
        except RuntimeError as error:
            raise PeerError(meeting.host_name, None) from error
        self.store = LauncherStore(store, seconds=seconds, is_served_here=False)

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
