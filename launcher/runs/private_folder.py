"""Temporary folders of runs, which leave nothing behind even if their process is killed.

Each folder holds a locked file for as long as its process, or a rank that was forked from it, is
alive. Whoever makes the next folder removes those of this user whose lock is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launcher.runs.locks import try_lock

_PREFIX = "launcher-"
_LOCK = "launcher.lock"
_COMPILER_CACHES = "torchinductor_*"
"""Folders that importing torch makes in the temporary folder, for code that it compiles."""


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder on a local disk that only this user can read, for the duration of the context.

    Folders that killed processes of this user have left are removed, and empty caches of torch's
    compiler with them.

    Raises:
        OSError: The folder cannot be made.
    """
    parent = Path(tempfile.gettempdir())
    _remove_left(parent)
    # The name is chosen first: an interrupt directly after mkdir must not leave the folder.
    folder, pid = parent / f"{_PREFIX}{secrets.token_hex(8)}", os.getpid()
    try:
        folder.mkdir(mode=0o700)
        with _locked(folder):
            yield folder
    finally:
        if os.getpid() == pid:  # a forked process may leave this context as well
            shutil.rmtree(folder, ignore_errors=True)
            _remove_empty_caches(parent)


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


def _remove_left(parent: Path) -> None:
    """Remove the folders in `parent` whose processes have ended."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
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
