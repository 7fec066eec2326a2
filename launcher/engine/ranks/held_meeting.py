"""A meeting as its host holds it: the connections to the guests, and what they say and are told.

`launcher.engine.ranks.round_host` has the decisions.
"""

from __future__ import annotations

import selectors
import socket
import time

from launcher.engine.ranks.lifelines import Lifeline, accept
from launcher.engine.ranks.round_host import RoundHost
from launcher.engine.ranks.round_messages import Hello, Message


class HeldMeeting:
    """The connections of a host, which others open to its listeners.

    Args:
        host: What the host decides.
        seat: The seat of this launcher.
        selector: Watches the sockets; whoever polls it passes what it finds to `handle`.
        timeout: Seconds without an answer of a machine after which it counts as lost.
    """

    def __init__(
        self, host: RoundHost, seat: int, selector: selectors.BaseSelector, timeout: float
    ) -> None:
        self.host = host
        self._seat, self._selector, self._timeout = seat, selector, timeout
        self._listeners: list[socket.socket] = []
        self._guests: dict[int, Lifeline] = {}
        """The connections to guests, by seats."""

        self._strangers: set[Lifeline] = set()
        """Connections that have not said who they are."""

    @property
    def has_guests(self) -> bool:
        """Whether another launcher is connected that has a seat."""
        return bool(self._guests)

    def listen(self, listener: socket.socket) -> None:
        """Accept connections at a socket, which `close` closes."""
        self._listeners.append(listener)
        self._selector.register(listener, selectors.EVENT_READ, listener)

    def handle(self, found: socket.socket | Lifeline) -> None:
        """Accept the connections that wait at a listener, or read from a connection."""
        if isinstance(found, Lifeline):
            self._read(found)
            return
        for link in accept(found, self._timeout):
            self._strangers.add(link)
            self._selector.register(link, selectors.EVENT_READ, link)

    def advance(self) -> list[Message]:
        """Let the host decide and tell the guests; return what it tells its own launcher."""
        self.host.advance(time.monotonic())
        outbox, self.host.outbox = self.host.outbox, []
        own = []
        for seat, message in outbox:
            if seat == self._seat:
                own.append(message)
            elif seat in self._guests:
                self._guests[seat].send(message)
        if not outbox:
            self.flush()
        return own

    def flush(self) -> bool:
        """Send the guests what is left; return whether nothing is."""
        unsent = [link for link in self._guests.values() if not link.flush()]
        return not unsent

    def close(self) -> None:
        """Close all connections and listeners."""
        for link in (*self._guests.values(), *self._strangers):
            link.close()
        for listener in self._listeners:
            listener.close()
        self._guests.clear()
        self._strangers.clear()

    def _read(self, link: Lifeline) -> None:
        if not link.is_open:  # another launcher has taken its seat
            return
        for message in link.receive():
            if link.seat is not None:
                self.host.receive(link.seat, message)
            elif isinstance(message, Hello):
                self._seat_guest(link, message)
            else:
                link.is_open = False
        if not link.is_open:
            self._drop(link)

    def _seat_guest(self, link: Lifeline, hello: Hello) -> None:
        self._strangers.discard(link)
        before = len(self.host.outbox)
        link.seat = self.host.join(hello.seat, hello, link.peer, time.monotonic())
        if link.seat is None:
            for _, message in self.host.outbox[before:]:
                link.send(message)
            del self.host.outbox[before:]
            link.is_open = False
            return
        earlier = self._guests.get(link.seat)
        self._guests[link.seat] = link
        if earlier is not None:
            self._selector.unregister(earlier)
            earlier.close()

    def _drop(self, link: Lifeline) -> None:
        self._selector.unregister(link)
        link.close()
        self._strangers.discard(link)
        if link.seat is not None:
            del self._guests[link.seat]
            self.host.lose(link.seat)
