"""The launchers of a run on several nodes: they meet, agree, and hear of each other's end."""

from __future__ import annotations

import contextlib
import json
import platform
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore

from launcher.environment.nodes import Nodes
from launcher.errors import EXIT_RESUMABLE, PeerError, WorldError

_SECONDS_BETWEEN_TRIES = 0.1
_SECONDS_BETWEEN_WORDS = 15.0
"""While somebody is waited for."""

_SECONDS_BETWEEN_BEATS = 1.0
_SECONDS_OF_SILENCE = 20.0
"""After which a node is taken for lost."""

_SECONDS_TO_PART = 6.0
_SECONDS_TO_EXIT = 1.0

_FAILURE = "failure"


class Rendezvous:
    """A store on the first node that the launchers of all nodes share.

    It listens on all interfaces of that node; the ranks meet at it as well.

    Args:
        nodes: Who meets, and where.
        said: What all of them have to agree on.
        tell: Is given what there is to say while somebody is waited for.

    Raises:
        WorldError: Not all came in time, or they do not agree. Where Slurm has started them, the
            first node says so, and the others end with it.
    """

    def __init__(self, nodes: Nodes, said: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        self.count = nodes.count
        self.address = (nodes.host, nodes.port)
        self._nodes, self._tell = nodes, tell
        self._until = time.monotonic() + nodes.join_timeout
        self.store, first = self._open()
        self.index = self._arrive(first=first)
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._next_beat = 0.0
        mine = {"node": platform.node(), **said}
        self.store.set(f"node{self.index}", json.dumps(mine))
        everybody = [json.loads(self._wait_for(f"node{index}")) for index in range(self.count)]
        self.names = [each.pop("node") for each in everybody]
        self._compare(everybody)

    def share(self, make: Callable[[], str]) -> str:
        """Return what `make` returns on the first node (collective; once).

        Raises:
            LauncherError: What it raised there; PeerError on the others.
        """
        if self.index == 0:
            value = make()
            self.store.set("shared", value)
            return value
        self._wait_until(lambda: self._has("shared") or self._has(_FAILURE), lambda: self.names[0])
        self.check_peers()
        return self.store.get("shared").decode()

    def report(self, exit_code: int | None, index: int | None = None) -> None:
        """Have the other nodes know that one has failed, by default this, or gone."""
        failure = {"index": self.index if index is None else index, "exit_code": exit_code}
        with contextlib.suppress(RuntimeError):  # the first node has gone, with all its ranks
            self.store.compare_set(_FAILURE, "", json.dumps(failure))

    @property
    def is_echo(self) -> bool:
        """Whether the first node, whose output is next to this one's, says all there is to say."""
        return self.index > 0 and bool(self._nodes.names)

    def leave(self, exit_code: int) -> int:
        """Leave; return the exit code of this node. The first leaves last.

        The others can hear from it until then. And srun takes a task that ends with another code
        than 0 for a reason to end all: of a run that has stopped to go on later, the first node
        alone says so, when the others have ended.
        """
        with contextlib.suppress(RuntimeError):
            if self.index > 0:
                self.store.set(f"left{self.index}", "")
                return 0 if self.is_echo and exit_code == EXIT_RESUMABLE else exit_code
            others = [f"left{index}" for index in range(1, self.count)]
            until = time.monotonic() + _SECONDS_TO_PART
            while time.monotonic() < until and not self.store.check(others):
                time.sleep(_SECONDS_BETWEEN_TRIES)
        if self._nodes.names and exit_code:
            time.sleep(_SECONDS_TO_EXIT)
        return exit_code

    def check_peers(self, *, patiently: bool = False) -> None:
        """Raise an error if another node has failed or gone; say that this one has not.

        Args:
            patiently: Whether to wait until that is so, for some seconds.

        Raises:
            PeerError: It has.
        """
        until = time.monotonic() + (_SECONDS_OF_SILENCE if patiently else 0)
        while True:
            if time.monotonic() >= self._next_beat:
                self._next_beat = time.monotonic() + _SECONDS_BETWEEN_BEATS
                try:
                    self._check_peers()
                except RuntimeError as error:  # of the store
                    raise PeerError(self.names[0], None) from error
            if time.monotonic() >= until:
                return
            time.sleep(_SECONDS_BETWEEN_TRIES)

    def _check_peers(self) -> None:
        if self._has(_FAILURE):
            failure = json.loads(self.store.get(_FAILURE))
            if failure["index"] != self.index:
                raise PeerError(self.names[failure["index"]], failure["exit_code"])
        self.store.set(f"beat{self.index}", str(time.time()))
        for other in range(1, self.count) if self.index == 0 else [0]:
            name = f"beat{other}"
            beat = self.store.get(name) if self.store.check([name]) else b""
            before, since = self._beats.get(other, (None, 0.0))
            if beat != before:
                self._beats[other] = (beat, time.monotonic())
            elif time.monotonic() - since > _SECONDS_OF_SILENCE:
                self.report(None, other)
                raise PeerError(self.names[other], None)

    def _open(self) -> tuple[TCPStore, bool]:
        """Return the store, and whether it is on this node."""
        host, port = self.address
        timeout = timedelta(seconds=self._nodes.join_timeout)
        here = self._nodes.index == 0 if self._nodes.index is not None else _is_here(host)
        if here:
            try:
                store = TCPStore(
                    host, port, is_master=True, timeout=timeout, wait_for_workers=False
                )
            except RuntimeError as error:
                if self._nodes.index is not None or "EADDRINUSE" not in str(error):
                    raise WorldError(
                        f"Cannot listen on port {port} of {platform.node()} for the other nodes: "
                        f"{str(error).splitlines()[0]}"
                    ) from None
                # Another launcher on this machine was first.
            else:
                return store, True
        self._wait_until(lambda: answers(host, port), lambda: f"{host}:{port}")
        return TCPStore(host, port, is_master=False, timeout=timeout), False

    def _arrive(self, *, first: bool) -> int:
        """Return which node this is."""
        if self._nodes.index is not None:
            return self._nodes.index
        index = 0 if first else self.store.add("arrivals", 1)
        if index >= self.count:
            raise WorldError(
                f"--nodes {self.count}: as many launchers have met at {self.address[0]}:"
                f"{self.address[1]} already."
            )
        return index

    def _wait_for(self, key: str) -> bytes:
        """Return a value of the store as soon as it is there."""
        self._wait_until(lambda: self._has(key), self._missing)
        return bytes(self.store.get(key))

    def _has(self, key: str) -> bool:
        try:
            return bool(self.store.check([key]))
        except RuntimeError:
            raise PeerError(self.address[0], None) from None

    def _missing(self) -> str:
        """Return who is not there yet."""
        missing = [index for index in range(self.count) if not self._has(f"node{index}")]
        names = [self._nodes.names[each] for each in missing if each < len(self._nodes.names)]
        return ", ".join(names) or f"{len(missing)} of {self.count} nodes"

    def _wait_until(self, is_so: Callable[[], bool], missing: Callable[[], str]) -> None:
        """Wait in short turns, so that Ctrl-C is heard."""
        word = time.monotonic() + _SECONDS_BETWEEN_WORDS
        while not is_so():
            now = time.monotonic()
            if now > self._until:
                raise WorldError(
                    f"{self.count} nodes are to run together, and after "
                    f"{self._nodes.join_timeout:.0f} s nothing has been heard of {missing()}. "
                    f"Was it started, and can it be reached from {platform.node()}?"
                )
            if now > word:
                word = now + _SECONDS_BETWEEN_WORDS
                self._tell(f"launcher: waiting for {missing()}")
            time.sleep(_SECONDS_BETWEEN_TRIES)

    def _compare(self, everybody: list[dict[str, Any]]) -> None:
        for name, said in zip(self.names, everybody, strict=True):
            for what, value in said.items():
                if value == everybody[0][what]:
                    continue
                if self.index > 0 and self._nodes.index is not None:
                    raise PeerError(self.names[0], WorldError.exit_code)
                raise WorldError(
                    f"The nodes of a run have the same {what}: {self.names[0]} has "
                    f"{everybody[0][what]}, {name} has {value}."
                )


def _is_here(host: str) -> bool:
    """Return whether a name is one of this machine."""
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise WorldError(f"--rendezvous {host}: no such machine is known here ({error}).") from None
    for family, kind, _, _, address in addresses:
        try:
            with socket.socket(family, kind) as probe:
                probe.bind((address[0], 0))
        except OSError:
            continue
        return True
    return False


def answers(host: str, port: int) -> bool:
    """Return whether something listens at an address."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True
