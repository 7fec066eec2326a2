"""The rendezvous of a run on several nodes: launchers meet, agree, and notice each other's end."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from launcher.engine.ranks.launcher_store import LauncherStore, connect_store, open_store
from launcher.environment.nodes import Nodes
from launcher.errors import EXIT_RESUMABLE, CutOffError, PeerError, WorldError

_POLL_SECONDS = 0.1
_SECONDS_BETWEEN_MESSAGES = 15.0
"""Interval of the messages that name the nodes that have not arrived."""

_SECONDS_BETWEEN_HEARTBEATS = 1.0
_SECONDS_TO_LEAVE = 6.0
"""How long the first node, which holds the store, waits for the others to leave before it does."""

_SECONDS_TO_FINISH = 300.0
"""How long a node whose ranks have finished waits for those of the others."""

_SECONDS_TO_EXIT = 1.0
"""How long a failed task of srun waits, so that the others can exit before srun ends them."""

SAME_COMMAND = (
    "Start every node with the same command, and with -n RANKS if they have different numbers of "
    "GPUs."
)
"""What to do about nodes that would run something else."""

_FAILURE = "failure"
"""Key of the store that holds the first failure of a node."""


class NodeGroup(Protocol):
    """The launchers of the nodes that start ranks together, as one of them sees the others."""

    index: int
    """Index of this node."""

    count: int
    """Number of nodes."""

    names: Sequence[str]
    """Names of the nodes."""

    address: tuple[str, int]
    """Host and port of the store."""

    store: LauncherStore
    """The store of the launchers, at which their ranks meet as well."""

    @property
    def is_quiet(self) -> bool:
        """Whether this node stays quiet, because the first node prints to the same output."""

    def share(self, make: Callable[[], str]) -> str:
        """Call `make` on the first node; return its result on every node (collective)."""

    def check_peers(self, *, wait: bool = False) -> None:
        """Raise PeerError if another node has failed or disappeared."""

    def wait_for_ranks(self) -> None:
        """Wait until the ranks of all nodes have finished, after those of this one have.

        Raises PeerError if another node has failed meanwhile.
        """

    def report(self, exit_code: int) -> None:
        """Tell the other nodes that this one has failed."""

    def leave(self, exit_code: int) -> int:
        """Leave the group; return the exit code for the process of this node."""


class Rendezvous:
    """The launchers of all nodes, joined by a store on the first of them.

    The store listens on all interfaces of the first node; the ranks meet at it as well. The
    constructor returns when every node has arrived and all agree.

    Args:
        nodes: The nodes, and the address at which they meet.
        agreement: Values that must be the same on every node, by the names that messages use.
        report_progress: Called with a message about the nodes that have not arrived.

    Raises:
        WorldError: A node does not arrive in time, or its values differ. Where the nodes have
            indices before they meet, as under Slurm, only the first node raises this error about
            values.
        PeerError: The values of a node differ, and the first node raises WorldError.
    """

    def __init__(
        self,
        nodes: Nodes,
        agreement: Mapping[str, Any],
        report_progress: Callable[[str], None],
    ) -> None:
        self.count = nodes.count
        self.address = (nodes.host, nodes.port)
        self._nodes, self._report_progress = nodes, report_progress
        self._deadline = time.monotonic() + nodes.join_timeout
        self.store, is_first = self._open_store()
        self.index = self._find_index(is_first=is_first)
        self._heartbeats: dict[int, tuple[bytes, float]] = {}
        self._next_heartbeat, self._last_heartbeat = 0.0, math.inf
        self._still_seconds, self._still_until = 0.0, -math.inf
        """How long this node has stood still, for longer than a node may, and until when."""

        own_values = {"node": platform.node(), **agreement}
        self.store.set(f"node{self.index}", json.dumps(own_values))
        values = [json.loads(self._wait_for_key(f"node{index}")) for index in range(self.count)]
        self.names: Sequence[str] = [node_values.pop("node") for node_values in values]
        self._check_agreement(values)

    def share(self, make: Callable[[], str]) -> str:
        """Call `make` on the first node; return its result on every node (collective, only once).

        Raises:
            LauncherError: The error that `make` raised on the first node; PeerError on the others.
        """
        if self.index == 0:
            value = make()
            self.store.set("shared", value)
            return value
        self._wait_until(lambda: self._has("shared") or self._has(_FAILURE), lambda: self.names[0])
        try:
            self._check_failure()  # no heartbeat is written before others can follow it
            return self.store.get("shared").decode()
        except RuntimeError as error:
            raise PeerError(self.names[0], None) from error

    def report(self, exit_code: int | None, index: int | None = None) -> None:
        """Tell the other nodes that a node has failed or disappeared.

        Only the first report counts. Nothing happens if the first node, and with it the store, is
        gone.

        Args:
            exit_code: Exit code of the node; None if it disappeared.
            index: Index of the node; None is this one.
        """
        failure = {"index": self.index if index is None else index, "exit_code": exit_code}
        with contextlib.suppress(RuntimeError):
            self.store.set_once(_FAILURE, json.dumps(failure))

    @property
    def is_quiet(self) -> bool:
        """Whether this node stays quiet, because the first node prints to the same output."""
        return self.index > 0 and bool(self._nodes.names)

    def wait_for_ranks(self) -> None:
        """Wait until the ranks of all nodes have finished, after those of this one have.

        Once those of the first node have, rank 0 has written the result, and a node that disappears
        is no failure.

        Raises:
            PeerError: Another node has failed, or has disappeared before that.
        """
        deadline = time.monotonic() + _SECONDS_TO_FINISH
        keys = [f"finished{index}" for index in range(self.count)]
        has_result = False
        try:
            self._check_own_heartbeat()
            self.store.set(keys[self.index], "")
            while time.monotonic() < deadline and not self.store.check(keys):
                has_result = has_result or self.store.check(keys[:1])
                self.check_peers()
                time.sleep(_POLL_SECONDS)
        except RuntimeError as error:  # the store, and with it the first node, is gone
            if not has_result:
                raise self._lost(0) from error
        except PeerError as error:
            if not (error.gone and has_result):
                raise
            self._report_progress(f"launcher: {error}")

    def leave(self, exit_code: int) -> int:
        """Leave the rendezvous; return the exit code for the process of this node.

        The first node leaves last, so that its store serves the others until they have left. srun
        ends all tasks as soon as one exits with a code other than 0: when a run stops to be resumed
        later, only the first node exits with that code, after the others have exited.

        Args:
            exit_code: Exit code of the run on this node.
        """
        with contextlib.suppress(RuntimeError):
            if self.index > 0:
                self.store.set(f"left{self.index}", "")
                return 0 if self.is_quiet and exit_code == EXIT_RESUMABLE else exit_code
            keys = [f"left{index}" for index in range(1, self.count)]
            deadline = time.monotonic() + _SECONDS_TO_LEAVE
            while time.monotonic() < deadline and not self.store.check(keys):
                time.sleep(_POLL_SECONDS)
        self.store.close()
        if self._nodes.names and exit_code:
            time.sleep(_SECONDS_TO_EXIT)
        return exit_code

    def check_peers(self, *, wait: bool = False) -> None:
        """Write the heartbeat of this node and check those of the others, at most once a second.

        Args:
            wait: Whether to keep checking until a lost node is certain to have been noticed.

        Raises:
            PeerError: Another node has failed or disappeared.
            CutOffError: The others have ended the run because this node stood still.
        """
        deadline = time.monotonic() + (self._nodes.node_timeout if wait else 0)
        while True:
            if time.monotonic() >= self._next_heartbeat:
                try:
                    self._check_own_heartbeat()
                    self._exchange_heartbeats()
                except RuntimeError as error:  # the store, and with it the first node, is gone
                    raise self._lost(0) from error
                self._last_heartbeat = time.monotonic()
                self._next_heartbeat = self._last_heartbeat + _SECONDS_BETWEEN_HEARTBEATS
            if time.monotonic() >= deadline:
                return
            time.sleep(_POLL_SECONDS)

    def _exchange_heartbeats(self) -> None:
        """Write this node's heartbeat; the first node checks all others, and they check the first.

        Raises:
            PeerError: Another node has failed or disappeared.
            CutOffError: The others have ended the run because this node stood still.
            RuntimeError: The store cannot be reached.
        """
        self._check_failure()
        self.store.set(f"beat{self.index}", str(time.time()))
        for other in range(1, self.count) if self.index == 0 else [0]:
            key = f"beat{other}"
            heartbeat = self.store.get(key) if self.store.check([key]) else b""
            previous, since = self._heartbeats.get(other, (None, 0.0))
            if heartbeat != previous:
                self._heartbeats[other] = (heartbeat, time.monotonic())
                continue
            # One that has just joined may import for longer than between heartbeats.
            patience = self._nodes.node_timeout if heartbeat else self._nodes.join_timeout
            if time.monotonic() - since > patience:
                self.report(None, other)
                raise self._lost(other)

    def _check_own_heartbeat(self) -> None:
        """Note whether this node stands still, so that the others may have taken it for lost.

        Raises:
            CutOffError: The first node has left meanwhile.
        """
        now = time.monotonic()
        seconds = now - self._last_heartbeat
        if seconds <= self._nodes.node_timeout:
            return
        self._still_seconds, self._still_until = seconds, now
        if self.index > 0 and not accepts_connections(*self.address):
            self.store.give_up()  # torch would print a stack
            raise CutOffError(self.names[self.index], seconds)

    def _lost(self, index: int) -> PeerError:
        """Return the error for a node that does not answer; this one may be the reason."""
        is_recent = time.monotonic() - self._still_until < 2 * self._nodes.node_timeout
        if is_recent:
            return CutOffError(self.names[self.index], self._still_seconds)
        return PeerError(self.names[index], None)

    def _check_failure(self) -> None:
        """Check whether a node has been reported.

        Raises:
            PeerError: Another node has failed or disappeared.
            CutOffError: The others have ended the run because this node stood still.
            RuntimeError: The store cannot be reached.
        """
        if self.store.check([_FAILURE]):
            failure = json.loads(self.store.get(_FAILURE))
            if failure["index"] != self.index:
                raise PeerError(self.names[failure["index"]], failure["exit_code"])
            if failure["exit_code"] is None:
                seconds = max(self._still_seconds, self._nodes.node_timeout)
                raise CutOffError(self.names[self.index], seconds)

    def _open_store(self) -> tuple[LauncherStore, bool]:
        """Open the store; return it, and whether this launcher is the one that has it served.

        Raises:
            WorldError: The port cannot be opened, or the first node does not open it in time.
        """
        host, port = self.address
        index, seconds = self._nodes.index, self._nodes.node_timeout
        if index == 0:  # the name of a pod may be published after the pod has started
            self._wait_until(lambda: can_resolve(host), lambda: f"the name {host}")
        if index == 0 if index is not None else is_this_machine(host):
            try:
                return open_store(port, seconds=seconds, timeout=self._nodes.join_timeout), True
            except RuntimeError as error:
                if index is not None or "EADDRINUSE" not in str(error):
                    raise WorldError(
                        f"Cannot listen on port {port} of {platform.node()} for the other nodes: "
                        f"{str(error).splitlines()[0]}"
                    ) from None
                # Another launcher on this machine opened the port first and serves the store.
        self._wait_until(lambda: accepts_connections(host, port), lambda: f"{host}:{port}")
        try:
            store = connect_store(host, port, max(self._deadline - time.monotonic(), 1.0))
        except RuntimeError:
            raise WorldError(self._late_text(f"{host}:{port}")) from None
        return LauncherStore(store, seconds=seconds), False

    def _find_index(self, *, is_first: bool) -> int:
        """Return the index of this node: as planned, or else by order of arrival.

        Raises:
            WorldError: As many nodes as planned have arrived before this one.
        """
        if self._nodes.index is not None:
            return self._nodes.index
        index = 0 if is_first else self.store.add("arrivals", 1)
        if index >= self.count:
            raise WorldError(
                f"--nodes {self.count}: that many launchers have met at {self.address[0]}:"
                f"{self.address[1]} already. Start one launcher per node, and give runs that start "
                "at the same time ports of their own."
            )
        return index

    def _wait_for_key(self, key: str) -> bytes:
        """Wait until the store has a key, and return its value.

        Raises:
            WorldError: The deadline passes.
        """
        self._wait_until(lambda: self._has(key), self._missing_nodes)
        return self.store.get(key)

    def _has(self, key: str) -> bool:
        try:
            return self.store.check([key])
        except RuntimeError:
            raise PeerError(self.address[0], None) from None

    def _missing_nodes(self) -> str:
        """Return the names of the nodes that have not arrived, or their number if unnamed."""
        missing = [index for index in range(self.count) if not self._has(f"node{index}")]
        names = [self._nodes.names[index] for index in missing if index < len(self._nodes.names)]
        return ", ".join(names) or f"{len(missing)} of {self.count} nodes"

    def _wait_until(self, is_done: Callable[[], bool], missing: Callable[[], str]) -> None:
        """Poll until `is_done` returns True; Python handles Ctrl-C between the polls.

        Raises:
            WorldError: The deadline passes.
        """
        message_at = time.monotonic() + _SECONDS_BETWEEN_MESSAGES
        while not is_done():
            now = time.monotonic()
            if now > self._deadline:
                raise WorldError(self._late_text(missing()))
            if now > message_at:
                message_at = now + _SECONDS_BETWEEN_MESSAGES
                self._report_progress(f"launcher: waiting for {missing()}")
            time.sleep(_POLL_SECONDS)

    def _late_text(self, missing: str) -> str:
        return (
            f"Waited {self._nodes.join_timeout:.0f} s for {missing} to join this run of "
            f"{self.count} nodes. Check that every node was started and can be reached "
            f"from {platform.node()}, or give a longer --join-timeout."
        )

    def _check_agreement(self, values: list[dict[str, Any]]) -> None:
        """Compare the values of every node with those of the first.

        Raises:
            WorldError: They differ, and this node reports it.
            PeerError: They differ, and the first node reports it.
        """
        for name, node_values in zip(self.names, values, strict=True):
            for key, value in node_values.items():
                if value == values[0][key]:
                    continue
                if self.index > 0 and self._nodes.index is not None:
                    raise PeerError(self.names[0], WorldError.exit_code)
                raise WorldError(
                    f"The nodes of a run need the same {key}: {self.names[0]} has "
                    f"{values[0][key]}, {name} has {value}. {SAME_COMMAND}"
                )


def can_resolve(host: str) -> bool:
    """Return whether a host name has an address."""
    try:
        return bool(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError):
        return False


def is_this_machine(host: str) -> bool:
    """Return whether a host name or address belongs to this machine.

    Raises:
        WorldError: The name cannot be resolved.
    """
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise WorldError(
            f"--rendezvous {host}: this machine cannot resolve that name ({error}). Give the name "
            "or the address of the first node."
        ) from None
    for family, kind, _, _, address in addresses:
        try:
            with socket.socket(family, kind) as probe:
                probe.bind((address[0], 0))
        except OSError:
            continue
        return True
    return False


def accepts_connections(host: str, port: int) -> bool:
    """Return whether something accepts connections at an address, within 5 s."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except (OSError, UnicodeError):
        return False
    return True
