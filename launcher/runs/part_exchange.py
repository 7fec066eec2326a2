"""Parts of quick checkpoints on their way to another node, over one TCP connection for each rank.

The process that writes the part of a rank sends it to the process of the rank that is as many ranks
further on as a node has, which writes it into its own node's folder. This module is loaded by these
processes and imports nothing but Python's own modules.

After 64 letters that only the ranks of the run know, the sender announces each file in a line of
JSON (step, name, num_bytes) and sends its bytes. The receiver answers with a line that has the size
and the SHA-256 of what is on its disk, or an error.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import platform
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from typing import Any

from launcher.runs.shard_files import BLOCK_BYTES, NewFile, error_text

_TOKEN_LETTERS = 64
_MAX_LINE = 4096
_SECONDS_TO_CONNECT = 10.0
_SECONDS_TO_ANSWER = 60.0
"""How long the other node may take for a block, or to write a file to its disk."""

_SECONDS_TO_PROBE = 10
_NAME = re.compile(r"shard-[0-9A-Za-z-]+\.safetensors")


def target(host: str, port: int, token: str, step: int) -> dict[str, Any]:
    """Return where the files of a part are sent, for `launcher.runs.shard_files.encode_request`.

    Args:
        host: Address of the other node.
        port: Port of the `Receiver` there.
        token: 64 letters that the receiver expects.
        step: The step of the checkpoint.
    """
    return {"host": host, "port": port, "token": token, "step": step}


class Connections:
    """The connection of a process to its neighbour, which is kept from one checkpoint to the next.

    It is made anew after an error, and for another neighbour.
    """

    def __init__(self) -> None:
        self._connection: _Connection | None = None

    def sender(self, to: Mapping[str, Any]) -> PartSender:
        """Return what sends the files of a part to a target.

        Raises:
            OSError: The other node cannot be reached.
        """
        known = self._connection
        if known is None or known.is_broken or known.place != _place(to):
            if known is not None:
                known.close()
            self._connection = known = _Connection(to)
        return PartSender(known, to["step"])


class _Connection:
    """A connection to the receiver on another node."""

    def __init__(self, to: Mapping[str, Any]) -> None:
        self.place, self.is_broken = _place(to), True
        address = (to["host"], to["port"])
        try:
            self.socket = socket.create_connection(address, timeout=_SECONDS_TO_CONNECT)
        except OSError as error:
            raise OSError(f"{to['host']}: {error_text(error)}") from None
        _probe(self.socket)
        self.socket.settimeout(_SECONDS_TO_ANSWER)
        self.lines = self.socket.makefile("rb")
        self.socket.sendall(to["token"].encode())
        self.is_broken = False

    def close(self) -> None:
        """Close the connection."""
        self.lines.close()
        self.socket.close()


class PartSender:
    """Sends the files of one part: a `launcher.runs.shard_files.Sender`.

    Args:
        connection: The connection to the other node.
        step: The step of the checkpoint.
    """

    def __init__(self, connection: _Connection, step: int) -> None:
        self._connection, self._step = connection, step

    def begin(self, name: str, num_bytes: int) -> None:
        """Announce a file.

        Raises:
            OSError: The other node is gone.
        """
        line = {"step": self._step, "name": name, "num_bytes": num_bytes}
        self._connection.is_broken = True  # until the file has arrived
        self.send(memoryview(json.dumps(line).encode() + b"\n"))

    def send(self, block: memoryview) -> None:
        """Send the next bytes of the file.

        Raises:
            OSError: The other node is gone, or takes no bytes for a minute.
        """
        try:
            self._connection.socket.sendall(block)
        except OSError as error:
            raise OSError(f"{self._connection.place[0]}: {error_text(error)}") from None

    def end(self, name: str, expected: Mapping[str, Any]) -> None:
        """Wait until the other node has written the file, with this size and digest.

        Raises:
            OSError: It has written other bytes or none, or does not answer for a minute.
        """
        try:
            line = self._connection.lines.readline(_MAX_LINE)
        except OSError as error:
            raise OSError(f"{self._connection.place[0]}: {error_text(error)}") from None
        answer = json.loads(line) if line.endswith(b"\n") else {"error": "the connection was lost"}
        self._connection.is_broken = not line.endswith(b"\n")
        if "error" in answer:
            where = answer.get("node", self._connection.place[0])
            raise OSError(f"{where}: {answer['error']}")
        if answer != dict(expected):
            raise OSError(f"{self._connection.place[0]} has other bytes of {name}")


class Receiver:
    """Receives the parts of another rank, in threads, until this process ends.

    Args:
        host: Address at which to listen.
        token: The 64 letters that a sender begins with.
        folder: The folder of this rank's parts.

    Raises:
        OSError: There is no such address or folder.
    """

    def __init__(self, *, host: str, token: str, folder: str) -> None:
        self._token = token.encode()
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no further connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Receive files until the connection ends or brings something else."""
        with contextlib.suppress(OSError, ValueError, TypeError), connection:
            connection.settimeout(_SECONDS_TO_CONNECT)
            _probe(connection)
            with connection.makefile("rb") as source:
                if not hmac.compare_digest(source.read(_TOKEN_LETTERS), self._token):
                    return
                while True:
                    connection.settimeout(None)  # the next checkpoint may take hours
                    line = source.readline(_MAX_LINE)
                    if not line:
                        return
                    connection.settimeout(_SECONDS_TO_ANSWER)
                    answer = self._receive(source, **json.loads(line))
                    connection.sendall(json.dumps(answer).encode() + b"\n")

    def _receive(
        self, source: BufferedReader, *, step: int, name: str, num_bytes: int
    ) -> dict[str, Any]:
        """Write a file, and return its size and digest, or why it could not be written.

        Raises:
            OSError: The connection is lost.
            ValueError: The name is not that of a file of a part.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(name)
        failure: OSError | None = None
        with contextlib.ExitStack() as stack:
            try:
                file = self._open(int(step), name)
                stack.enter_context(_closed_at_any_rate(file))
            except OSError as error:
                failure = error
            buffer, left = memoryview(bytearray(BLOCK_BYTES)), num_bytes
            while left > 0:
                block = buffer[: min(left, BLOCK_BYTES)]
                if source.readinto(block) != len(block):
                    raise OSError("the connection was lost")
                left -= len(block)
                if failure is None:
                    failure = _failure_of(file.write, block)
            if failure is None:
                try:
                    return file.finish()
                except OSError as error:
                    failure = error
        return {"error": error_text(failure), "node": platform.node()}

    def _open(self, step: int, name: str) -> NewFile:
        """Open a new file in the folder of a part, which is made if it is missing."""
        part = f".step-{step:08}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, 0o700, dir_fd=self._folder)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        folder = os.open(part, flags, dir_fd=self._folder)
        try:
            return NewFile(folder, name)
        finally:
            os.close(folder)


def _failure_of(write: Callable[[memoryview], None], block: memoryview) -> OSError | None:
    """Return why a block cannot be written, or None: the rest of the file arrives all the same."""
    try:
        write(block)
    except OSError as error:
        return error
    return None


@contextlib.contextmanager
def _closed_at_any_rate(file: NewFile) -> Iterator[None]:
    """Close a file in the end, although a full disk does not take what is still in its buffer."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _place(to: Mapping[str, Any]) -> tuple[str, int, str]:
    return to["host"], to["port"], to["token"]


def _probe(connection: socket.socket) -> None:
    """Let the kernel notice, while nothing is sent, that the other node is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        connection.setsockopt(socket.IPPROTO_TCP, option, _SECONDS_TO_PROBE)
