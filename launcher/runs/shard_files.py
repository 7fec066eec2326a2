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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Piece = tuple[int, int]
"""Where consecutive bytes begin in the shared memory, and their number."""

REQUEST = struct.Struct("!QQ")
"""Where a request lies in the shared memory, and its length: a message to the process."""

MAX_ANSWER = 1 << 16
"""Largest answer of the process, in bytes."""

_BUFFER_BYTES = 1 << 20
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


def encode_request(files: Mapping[str, Sequence[Piece]], sums: str) -> bytes:
    """Return the request to write some files.

    Args:
        files: The pieces of each file, by its name.
        sums: Name of a further file, which gets the size and the SHA-256 of each file.
    """
    return json.dumps({"files": files, "sums": sums}, separators=(",", ":")).encode()


def write_files(memory: int, folder: int, place: Piece) -> dict[str, Any]:
    """Write the files of a request, wait until they are on the disk, and return what it took.

    The memory is read, not mapped, so that no page counts as memory of two processes.

    Args:
        memory: Descriptor of the shared memory.
        folder: Descriptor of the folder. A folder that has been removed since it was opened takes
            no files, whichever folder has its name now.
        place: Where the request lies in the shared memory.

    Returns:
        `seconds` and `num_bytes`.

    Raises:
        OSError: The folder or the disk takes no more files or bytes.
    """
    started = time.perf_counter()
    request = json.loads(os.pread(memory, place[1], place[0]))
    sums = {
        name: _write_file(memory, folder, name, pieces) for name, pieces in request["files"].items()
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


def _write_file(memory: int, folder: int, name: str, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Write one file, and return its size and digest."""
    digest, num_bytes = hashlib.sha256(), 0
    buffer, filled = memoryview(bytearray(_BUFFER_BYTES)), 0
    with _new_file(folder, name) as file:

        def flush() -> None:
            nonlocal filled, num_bytes
            digest.update(buffer[:filled])
            file.write(buffer[:filled])
            num_bytes, filled = num_bytes + filled, 0
            if num_bytes % _WINDOW_BYTES == 0:
                _send_to_disk(file.fileno(), num_bytes)

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
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"num_bytes": num_bytes, "sha256": digest.hexdigest()}


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


def main(channel: socket.socket, parent: int) -> None:
    """Write files as the other end of `channel` asks, until that end or the parent is gone.

    Args:
        channel: Carries a `REQUEST` with the descriptors of the memory and of the folder, and then
            its answer: what `write_files` returns, or `error`.
        parent: Process id of the rank.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before prctl took effect
        return
    os.nice(_NICENESS)
    with contextlib.suppress(ConnectionError):
        while True:
            message, descriptors, *_ = socket.recv_fds(channel, REQUEST.size, 2)
            if not message:
                return
            memory, folder = descriptors
            try:
                answer = write_files(memory, folder, REQUEST.unpack(message))
            except Exception as error:  # noqa: BLE001  # the rank reports it
                answer = {"error": error_text(error)}
            finally:
                os.close(memory)
                os.close(folder)
            channel.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
