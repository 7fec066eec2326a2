"""Reading and writing of regular files alone: no FIFO blocks, and no device is read without end."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from launcher.quantities import size

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file for reading, without a buffer.

    Raises:
        OSError: The file cannot be opened, or is something else than a regular file.
    """
    return _open(path, os.O_RDONLY, "rb")


def open_to_append(path: Path) -> io.BufferedWriter:
    """Open a regular file to append to it, and create it if it is missing.

    A symbolic link is refused, so that nothing is written outside the folder of `path`.

    Raises:
        OSError: The file cannot be opened, or is a link or something else than a regular file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    return io.BufferedWriter(_open(path, flags, "ab"))


def overwrite(path: Path, content: bytes) -> None:
    """Write a regular file in place of its present content, and create it if it is missing.

    A symbolic link is refused, so that nothing is written outside the folder of `path`.

    Raises:
        OSError: The file cannot be written, or is a link or something else than a regular file.
    """
    flags = os.O_WRONLY | os.O_TRUNC | os.O_CREAT | os.O_NOFOLLOW
    with io.BufferedWriter(_open(path, flags, "wb")) as file:
        file.write(content)


def open_descriptor(path: Path, flags: int) -> int:
    """Open a regular file and return its descriptor, which no program started later inherits.

    Args:
        path: The file.
        flags: Flags of `os.open`. With O_NOFOLLOW a symbolic link is refused.

    Raises:
        OSError: The file cannot be opened, or is something else than a regular file.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a FIFO that nobody reads
            raise OSError(errno.EINVAL, "Not a regular file", str(path)) from None
        if error.errno == errno.ELOOP and flags & os.O_NOFOLLOW and path.is_symlink():
            text = "It is a symbolic link, which could lead anywhere"
            raise OSError(errno.ELOOP, text, str(path)) from None
        raise
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        text = f"Not a regular file but {_KINDS.get(kind, 'something else')}"
        raise OSError(errno.EINVAL, text, str(path))
    return descriptor


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: The file cannot be read, is something else than a regular file, or holds more than
            `max_bytes` bytes.
    """
    with io.BufferedReader(open_regular(path)) as file:
        is_too_large = os.fstat(file.fileno()).st_size > max_bytes
        content = b"" if is_too_large else file.read(max_bytes + 1)
    if is_too_large or len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"It is larger than {size(max_bytes)}", str(path))
    return content


def size_of(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        OSError: The file cannot be opened, or is something else than a regular file.
    """
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def _open(path: Path, flags: int, mode: str) -> io.FileIO:
    try:
        return io.FileIO(path, mode, opener=lambda *_: open_descriptor(path, flags))
    except ValueError as error:  # the name holds a NUL byte
        raise OSError(errno.EINVAL, f"Not a name of a file: {error}", repr(str(path))) from None
