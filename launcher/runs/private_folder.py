"""Temporary folders of runs, which leave nothing behind even if their process is killed.

A process removes its folders when it ends, be it in a signal handler. Each folder holds a locked
file for as long as its process, or a rank that was forked from it, is alive. Whoever makes the next
folder removes those of this user whose lock is free.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launcher.paths import exists
from launcher.runs.locks import try_lock
from launcher.signals import call_before_end

_PREFIX = "launcher-"
_LOCK = "launcher.lock"
_COMPILER_CACHES = "torchinductor_*"
"""Folders that importing torch makes in the temporary folder, for code that it compiles."""

_ATTEMPTS = 5

_folders: list[tuple[int, Path]] = []
"""The folders that exist or are being made, each with the id of the process that makes it."""


@contextlib.contextmanager
def private_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a folder that only this user can read, for the duration of the context.

    Folders that killed processes of this user have left are removed, and empty caches of torch's
    compiler with them.

    Args:
        parent: The folder in which to make it, with a name that begins with a dot; None is the
            folder for temporary files, on a local disk.

    Raises:
        OSError: The folder cannot be made.
    """
    prefix = _PREFIX if parent is None else f".{_PREFIX}"
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    _remove_left(parent, prefix)
    folder = parent / f"{prefix}{secrets.token_hex(8)}"
    own = (os.getpid(), folder)
    _folders.append(own)  # before it exists: the process may end directly after mkdir
    try:
        folder.mkdir(mode=0o700)
        with _locked(folder):
            yield folder
    finally:
        _remove(*own)
        _folders.remove(own)


def remove_private_folders() -> None:
    """Remove the folders that this process has made, whose contexts may still be open."""
    for pid, folder in tuple(_folders):
        _remove(pid, folder)


atexit.register(remove_private_folders)  # an interrupt may leave a context before it removes
call_before_end(remove_private_folders)


def _remove(pid: int, folder: Path) -> None:
    """Remove a folder, unless this process is a fork of process `pid`, which made it.

    A process that is being killed may still write to the folder.
    """
    if os.getpid() != pid:
        return
    for _ in range(_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not exists(folder):
            break
    _remove_empty_caches(folder.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; the lock file has its name only once it is locked.

    Raises:
        OSError: The lock file cannot be made.
    """
    path = folder / f"{_LOCK}.new"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if try_lock(descriptor, fcntl.LOCK_EX):
            path.rename(folder / _LOCK)
        yield
    finally:
        os.close(descriptor)


def _remove_left(parent: Path, prefix: str) -> None:
    """Remove the folders in `parent` whose processes have ended."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_if_left(Path(entry.path))


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of this user if no process holds its lock.

    Raises:
        OSError: It has no lock file, or is not of this user.
    """
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        is_own = os.fstat(descriptor).st_uid == os.geteuid()
        if is_own and try_lock(descriptor, fcntl.LOCK_EX):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _remove_empty_caches(parent: Path) -> None:
    with contextlib.suppress(OSError):
        for cache in parent.glob(_COMPILER_CACHES):
            with contextlib.suppress(OSError):  # it holds compiled code, or is another user's
                cache.rmdir()
