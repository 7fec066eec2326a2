"""Connections between launchers: sockets that never block, over which lines of JSON are sent.

A connection tells its two ends when the other has gone. If a process ends, its machine closes the
connection. If a machine or the network is lost, the kernel notices that nothing is acknowledged.
Nothing is sent for that by this process, which may be busy for a long time.
"""

from __future__ import annotations

import contextlib
import os
import socket
import weakref
from collections.abc import Iterator

from launcher.engine.ranks.round_messages import MAX_LINE_BYTES, Message, decode, encode

_NUM_PROBES = 3
"""Probes that stay without an answer before a connection counts as lost; the kernel waits for whole
seconds, so that no timeout is shorter than one second more than these."""

_READ_BYTES = 1 << 16

_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
"""The sockets of this process, which a forked child closes, so that its parent's end is seen."""


def _close_all() -> None:
    for each in tuple(_open):
        each.close()


os.register_at_fork(after_in_child=_close_all)


def listen(port: int = 0) -> socket.socket:
    """Return a socket that listens on all interfaces, also for IPv6 where the machine has it.

    Raises:
        OSError: The port cannot be opened.
    """
    backlog = 4096  # the launchers of a large run come at the same moment
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            listener = socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
            )
            return _opened(listener)
    return _opened(socket.create_server(("", port), backlog=backlog))


def accept(listener: socket.socket, timeout: float) -> Iterator[Lifeline]:
    """Yield the connections that wait at a socket."""
    while True:
        try:
            connection, address = listener.accept()
        except OSError:
            return
        yield Lifeline(connection, timeout, str(address[0]).removeprefix("::ffff:"))


def connect(host: str, port: int, timeout: float) -> Lifeline | None:
    """Return a connection to an address; None if nothing answers within 5 s."""
    try:
        return Lifeline(socket.create_connection((host, port), timeout=5), timeout, host)
    except (OSError, UnicodeError):
        return None


def _opened(each: socket.socket) -> socket.socket:
    each.setblocking(False)
    _open.add(each)
    return each


class Lifeline:
    """A connection to another launcher.

    Args:
        connection: The socket.
        timeout: Seconds without an answer of the other machine after which it counts as lost.
        peer: Address of the other launcher.
    """

    def __init__(self, connection: socket.socket, timeout: float, peer: str) -> None:
        self._socket, self.peer = _opened(connection), peer
        self._received, self._unsent = bytearray(), bytearray()
        self.is_open = True
        self.seat: int | None = None
        """The seat of the guest at the other end, for the host."""

        each = max(int(timeout / (_NUM_PROBES + 1)), 1)
        options = {
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): each,
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): each,
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): _NUM_PROBES,
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): int(timeout * 1000),
            (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
        }
        for (level, name), value in options.items():
            connection.setsockopt(level, name, value)

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send a message now, or with the next calls of `flush`."""
        self._unsent += encode(message)
        self.flush()

    def flush(self) -> bool:
        """Send what is left; return whether nothing is."""
        try:
            while self._unsent and self.is_open:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return False
        except OSError:
            self._unsent.clear()  # a later read tells what happened, after the last messages
        return True

    def receive(self) -> Iterator[Message]:
        """Yield the messages that have arrived; `is_open` tells afterwards if there can be more."""
        while self.is_open:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self._received += data
            *lines, rest = bytes(self._received).split(b"\n")
            self._received = bytearray(rest)
            self.is_open = bool(data) and len(rest) <= MAX_LINE_BYTES
            for line in lines:
                try:
                    message = decode(line)
                except ValueError:  # something else has found this port
                    self.is_open = False
                    break
                yield message

    def close(self) -> None:
        """Close the connection; what has been sent still arrives."""
        self.is_open = False
        self._socket.close()
