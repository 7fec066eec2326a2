"""The files of one rank's part of a checkpoint, written from memory that two processes share.

This module is also the program of the process that writes them beside the training. It imports
nothing but Python's own modules, starts within some hundredths of a second, and knows neither
torch nor the format of the files: a request lists, for each file, the pieces of the shared memory
that make up its content.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

Piece = tuple[int, int]
"""Where consecutive bytes begin in the shared memory, and their number."""

REQUEST = struct.Struct("!QQ")
"""Where a request lies in the shared memory, and its length: a message to the process."""

MAX_ANSWER = 1 << 16
"""Largest answer of the process, in bytes."""

BLOCK_BYTES = 1 << 20
"""Bytes that are hashed and written at once, which the cache of a core holds."""

_WINDOW_BYTES = 8 << 20
_NUM_WINDOWS = 4
"""A file may be this many windows ahead of the disk. After that, writing waits for the disk."""

_START, _WAIT = 2, 7
"""What sync_file_range(2) does: start to write a range, or start and wait until it is written."""

_LIBC = ctypes.CDLL(None)
_LIBC.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

_NICENESS = 10
"""How far the process steps back behind the training for cores and, by the kernel's default for
this number (ioprio_set(2)), for the disk."""

_MAX_TEXT = 1000
_PR_SET_PDEATHSIG = 1


def encode_request(
    files: Mapping[str, Sequence[Piece]], sums: str, to: Mapping[str, Any] | None = None
) -> bytes:
    """Return the request to write some files.

    Args:
        files: The pieces of each file, by its name.
        sums: Name of a further file, which gets the size and the SHA-256 of each file.
        to: Where the files are also sent, as `launcher.runs.part_exchange.target` returns it; None
            sends them nowhere.
    """
    request = {"files": files, "sums": sums, "to": to}
    return json.dumps(request, separators=(",", ":")).encode()


class Sender(Protocol):
    """Sends files to another node while they are written here."""

    def begin(self, name: str, num_bytes: int) -> None:
        """Announce a file."""

    def send(self, block: memoryview) -> None:
        """Send the next bytes of the file."""

    def end(self, name: str, expected: Mapping[str, Any]) -> None:
        """Wait until the other node has written the file, with this size and digest."""


def write_files(
    memory: int,
    folder: int,
    place: Piece,
    connect: Callable[[Mapping[str, Any]], Sender] | None = None,
) -> dict[str, Any]:
    """Write the files of a request, wait until they are on the disk, and return what it took.

    The memory is read, not mapped, so that no page counts as memory of two processes.

    Args:
        memory: Descriptor of the shared memory.
        folder: Descriptor of the folder. A folder that has been removed since it was opened takes
            no files, whichever folder has its name now.
        place: Where the request lies in the shared memory.
        connect: Returns what sends files to a target; None, if no request has one.

    Returns:
        `seconds` and `num_bytes`.

    Raises:
        OSError: The folder or the disk takes no more files or bytes, here or on the node to which
            the files are sent, or that node does not answer.
    """
    started = time.perf_counter()
    request = json.loads(os.pread(memory, place[1], place[0]))
    sender: Sender | None = None
    if request["to"] is not None:
        if connect is None:
            raise OSError("only the process beside a rank sends files")
        sender = connect(request["to"])
    sums = {
        name: _write_file(memory, folder, name, pieces, sender)
        for name, pieces in request["files"].items()
    }
    with _new_file(folder, request["sums"]) as file:
        file.write(json.dumps(sums, indent=2).encode())
    return {
        "seconds": time.perf_counter() - started,
        "num_bytes": sum(each["num_bytes"] for each in sums.values()),
    }


def error_text(error: BaseException) -> str:
    """Return why files could not be written, without a full stop."""
    text = error.strerror if isinstance(error, OSError) else None
    return (text or str(error) or type(error).__name__)[:_MAX_TEXT].rstrip(".")


class NewFile:
    """A file that is hashed, written and sent to the disk as its bytes come.

    What another attempt has left under its name is removed.

    Args:
        folder: Descriptor of the folder.
        name: Name of the file.

    Raises:
        OSError: The file cannot be made.
    """

    def __init__(self, folder: int, name: str) -> None:
        self._digest, self._num_bytes = hashlib.sha256(), 0
        self._file = _new_file(folder, name)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: The disk does not take what has not been written yet.
        """
        self._file.close()

    def write(self, block: bytes | memoryview) -> None:
        """Append a block of `BLOCK_BYTES`, or the last one, which may have fewer.

        Raises:
            OSError: The disk takes no more bytes.
        """
        self._digest.update(block)
        self._file.write(block)
        self._num_bytes += len(block)
        if self._num_bytes % _WINDOW_BYTES == 0:
            _send_to_disk(self._file.fileno(), self._num_bytes)

    def finish(self) -> dict[str, Any]:
        """Wait until the file is on the disk, and return its size and digest.

        Raises:
            OSError: The disk does not take all bytes.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return {"num_bytes": self._num_bytes, "sha256": self._digest.hexdigest()}


def _write_file(
    memory: int, folder: int, name: str, pieces: Sequence[Piece], sender: Sender | None
) -> dict[str, Any]:
    """Write one file, send it if there is a neighbour, and return its size and digest."""
    buffer, filled = memoryview(bytearray(BLOCK_BYTES)), 0
    if sender is not None:
        sender.begin(name, sum(length for _, length in pieces))
    with NewFile(folder, name) as file:

        def flush() -> None:
            nonlocal filled
            file.write(buffer[:filled])
            if sender is not None:
                sender.send(buffer[:filled])
            filled = 0

        for start, length in pieces:
            position, end = start, start + length
            while position < end:
                count = os.preadv(memory, [buffer[filled : filled + end - position]], position)
                if not count:
                    raise OSError(f"the shared memory ends before the content of {name}")
                position += count
                filled += count
                if filled == len(buffer):
                    flush()
        flush()
        found = file.finish()
    if sender is not None:
        sender.end(name, found)
    return found


def _send_to_disk(file: int, num_bytes: int) -> None:
    """Start to write the newest window of a file to the disk, and let go of an older one.

    The disk thus works from the start, and the file takes no memory of the page cache from the
    training, which may read its data there.

    Args:
        file: Descriptor of the file.
        num_bytes: Bytes that have been written to it, a multiple of the size of a window.
    """
    _LIBC.sync_file_range(file, num_bytes - _WINDOW_BYTES, _WINDOW_BYTES, _START)
    older = num_bytes - _NUM_WINDOWS * _WINDOW_BYTES
    if older >= 0:
        _LIBC.sync_file_range(file, older, _WINDOW_BYTES, _WAIT)
        os.posix_fadvise(file, older, _WINDOW_BYTES, os.POSIX_FADV_DONTNEED)


def _new_file(folder: int, name: str) -> Any:
    """Open a new file in a folder; what another attempt has left under its name is removed."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    return open(name, "wb", opener=lambda path, _: os.open(path, flags, 0o666, dir_fd=folder))


def _exchange() -> Any:
    """Return `launcher.runs.part_exchange`, which this program loads only for neighbours.

    The package is found last, so that none of its names hides one of Python's own modules.
    """
    from pathlib import Path

    package = str(Path(__file__).parents[2])
    if package not in sys.path:
        sys.path.append(package)
    from launcher.runs import part_exchange

    return part_exchange


class _Answers:
    """Answers what a rank asks of its process: to write files, and to receive those of others."""

    def __init__(self) -> None:
        self._connections: Any = None
        self._receiver: Any = None

    def listen(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Receive files from now on, and return the port."""
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = _exchange().Receiver(**request)
        return {"port": self._receiver.port}

    def write(self, descriptors: Sequence[int], place: Piece) -> dict[str, Any]:
        """Write files as `write_files` does."""
        memory, folder = descriptors
        return write_files(memory, folder, place, self._connect)

    def _connect(self, to: Mapping[str, Any]) -> Sender:
        if self._connections is None:
            self._connections = _exchange().Connections()
        sender: Sender = self._connections.sender(to)
        return sender


def main(channel: socket.socket, parent: int) -> None:
    """Write files as the other end of `channel` asks, until that end or the parent is gone.

    Args:
        channel: Carries a `REQUEST` with the descriptors of the memory and of the folder, or the
            arguments of a `launcher.runs.part_exchange.Receiver` as JSON; and then its answer: what
            `write_files` returns, `port`, or `error`.
        parent: Process id of the rank.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before prctl took effect
        return
    os.nice(_NICENESS)
    answers = _Answers()
    with contextlib.suppress(ConnectionError):
        while True:
            message, descriptors, *_ = socket.recv_fds(channel, MAX_ANSWER, 2)
            if not message:
                return
            try:
                if descriptors:
                    answer = answers.write(descriptors, REQUEST.unpack(message))
                else:
                    answer = answers.listen(json.loads(message))
            except Exception as error:  # noqa: BLE001  # the rank reports it
                answer = {"error": error_text(error)}
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            channel.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
