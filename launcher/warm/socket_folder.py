"""The folder of a user's warm servers: one socket for each, and a lock for who starts one.

The folder belongs to the user alone. Its files are named relative to an open descriptor, so that
nothing that happens to its path later leads elsewhere, and no path is too long for a socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".socket"
_TEMPORARY = Path("/tmp")  # noqa: S108  # TMPDIR may differ between the shells of a user


class ForeignFolderError(Exception):
    """The folder of the sockets is not this user's alone; the text completes a sentence."""


class SocketFolder:
    """An open folder of sockets.

    Args:
        path: The folder.
        descriptor: The folder, opened.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def close(self) -> None:
        """Close the folder."""
        os.close(self._descriptor)

    def names(self) -> list[str]:
        """Return the names of the servers that have a socket here."""
        found = (entry for entry in os.listdir(self._descriptor) if entry.endswith(_SUFFIX))  # noqa: PTH208
        return sorted(entry.removesuffix(_SUFFIX) for entry in found)

    def connect(self, name: str, seconds: float) -> socket.socket:
        """Return a connection to a server of this user.

        Raises:
            OSError: There is none, or it does not listen.
        """
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            stream.settimeout(seconds)
            stream.connect(self._address(name))
        except BaseException:
            stream.close()
            raise
        return stream

    def listen(self, name: str) -> tuple[socket.socket, int]:
        """Return a socket that listens, and the number of its file (inode).

        A socket of this name that was here before is replaced.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        new = f"{name}.{os.getpid()}"
        self._unlink(new)
        listener.bind(self._address(new))
        os.chmod(new + _SUFFIX, 0o600, dir_fd=self._descriptor)
        listener.listen(128)
        os.rename(
            new + _SUFFIX,
            name + _SUFFIX,
            src_dir_fd=self._descriptor,
            dst_dir_fd=self._descriptor,
        )
        inode = self.inode(name)
        assert inode is not None
        return listener, inode

    def inode(self, name: str) -> int | None:
        """Return the number of a socket's file; None if there is none."""
        try:
            return os.stat(name + _SUFFIX, dir_fd=self._descriptor, follow_symlinks=False).st_ino
        except OSError:
            return None

    def remove(self, name: str, inode: int | None = None) -> None:
        """Remove a socket; with `inode`, only if it is still this one."""
        if inode is None or self.inode(name) == inode:
            self._unlink(name)

    def touch(self, name: str) -> None:
        """Record that a server is used now."""
        with contextlib.suppress(OSError):
            os.utime(name + _SUFFIX, dir_fd=self._descriptor, follow_symlinks=False)

    def last_used(self, name: str) -> float:
        """Return when a server was used last, in seconds since the epoch; 0 if it is gone."""
        try:
            return os.stat(name + _SUFFIX, dir_fd=self._descriptor, follow_symlinks=False).st_mtime
        except OSError:
            return 0.0

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the lock under which a server of this name is started or replaced."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(f"{name}.lock", flags, 0o600, dir_fd=self._descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _address(self, name: str) -> str:
        return f"/proc/self/fd/{self._descriptor}/{name}{_SUFFIX}"

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name + _SUFFIX, dir_fd=self._descriptor)


@contextlib.contextmanager
def open_socket_folder(*, makes: bool = True) -> Iterator[SocketFolder]:
    """Open the folder of this user's sockets, in XDG_RUNTIME_DIR or in /tmp.

    Args:
        makes: Whether the folder is made if it does not exist.

    Raises:
        ForeignFolderError: It is another user's, or others may write to it or read it.
        OSError: It does not exist, or cannot be made.
    """
    path = _path()
    if makes:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    folder = SocketFolder(path, descriptor)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise ForeignFolderError(f"{path} belongs to the user with the id {status.st_uid}")
        if mode := stat.S_IMODE(status.st_mode) & 0o077:
            raise ForeignFolderError(f"{path} is open to other users (mode {mode:03o} beside 700)")
        yield folder
    finally:
        folder.close()


def _path() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        with contextlib.suppress(OSError):
            if Path(runtime).stat().st_uid == os.geteuid():
                return Path(runtime) / "launcher-warm"
    return _TEMPORARY / f"launcher-warm-{os.geteuid()}"
