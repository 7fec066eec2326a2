"""Ownership of a run folder: only one launcher at a time writes into it.

The owner holds a lock (flock) on owner.lock in the run folder, and the file describes the owner.
The kernel releases the lock when the owner and its ranks have ended, however they ended, so a run
that was killed can be resumed at once.

Some file systems do not support such locks, or do not share them between machines. There the
content of owner.lock decides: a process of this machine is looked up, and a process of another
machine counts as alive while its ranks write heartbeats. Two launchers that start at the same
moment on two machines can both pass this weaker check.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from launcher.errors import RunDirError
from launcher.json_file import encode_json
from launcher.regular_file import open_descriptor
from launcher.runs.files import unwritable_error
from launcher.runs.heartbeat import read_heartbeats
from launcher.runs.locks import locks_are_shared, try_lock
from launcher.runs.owner_file import Owner, read_owner
from launcher.runs.process_owner import this_process
from launcher.runs.rundir import RunDir, check_subfolders
from launcher.runs.status import SECONDS_TO_START, is_alive

_SECONDS_TO_END = 10.0
"""Longest time in which the ranks of a killed launcher end; releasing a GPU takes seconds."""

_SECONDS_OF_LEASE = 120.0
"""Wait for the lock of a crashed machine, which an NFS server drops after 90 seconds."""

_SECONDS_OF_A_CHECK = 1.0
"""Wait for a lock that `check_unowned` on another machine holds for a moment."""

_SECONDS_BETWEEN_TRIES = 0.1


@contextlib.contextmanager
def own_run_dir(
    run_dir: RunDir, *, with_ranks: bool = False, takes_over: bool = False
) -> Iterator[None]:
    """Own a run folder for the duration of a `with` block.

    Nothing in the folder changes if another process owns it.

    Args:
        run_dir: The folder, which exists.
        with_ranks: Whether forked children of this process keep the folder owned until they end,
            even if this process dies first. Children of theirs never do.
        takes_over: Whether the owner is known to be lost, so that its lock is waited for.

    Raises:
        RunDirError: Another process owns the folder, owner.lock cannot be written, or a folder in
            it is a symbolic link.
    """
    lock = _acquire(run_dir, with_ranks=with_ranks, takes_over=takes_over)
    try:
        check_subfolders(run_dir)
        yield
    finally:
        lock.release()


def check_unowned(path: Path) -> None:
    """Refuse a run folder that another process owns, without writing anything.

    Another process may become the owner right after this check; only `own_run_dir` is certain.

    Args:
        path: The folder, which need not exist.

    Raises:
        RunDirError: Another process owns the folder.
    """
    run_dir = RunDir(path.resolve())
    try:
        descriptor = open_descriptor(run_dir.owner, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    start = time.monotonic()
    try:
        while isinstance(
            other := _other_owner(descriptor, run_dir, fcntl.LOCK_SH), _UnknownOwner
        ):  # it may be about to write its name
            if time.monotonic() - start >= _patience_seconds(other):
                break
            time.sleep(_SECONDS_BETWEEN_TRIES)
    finally:
        os.close(descriptor)
    if other is not None and not (isinstance(other, Owner) and other.is_dead):
        raise _refusal(run_dir, other)


class _UnknownOwner:
    """A process that holds the lock and that owner.lock does not describe."""

    words = "another process"


class _FolderLock:
    """The lock on a run folder that this process owns."""

    def __init__(self, descriptor: int, *, with_ranks: bool) -> None:
        self._descriptor, self._with_ranks = descriptor, with_ranks
        self._pid = os.getpid()
        _locks.append(self)

    def release(self) -> None:
        """Give up the lock, which remains until the ranks that share it have ended."""
        if self not in _locks or os.getpid() != self._pid:
            return
        _locks.remove(self)
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def after_fork(self) -> None:
        """Keep the lock in a rank, and drop it in every other forked process.

        A DataLoader worker outlives a killed rank by seconds, and other children of a rank may
        never end.
        """
        if self._with_ranks and os.getppid() == self._pid:
            return
        _locks.remove(self)
        os.close(self._descriptor)


_locks: list[_FolderLock] = []
"""The locks that this process holds."""


def _after_fork() -> None:
    for lock in tuple(_locks):
        lock.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _acquire(run_dir: RunDir, *, with_ranks: bool, takes_over: bool) -> _FolderLock:
    """Return the lock on a run folder, with this process written into owner.lock.

    Raises:
        RunDirError: Another process owns the folder, or owner.lock cannot be written.
    """
    try:
        descriptor = open_descriptor(run_dir.owner, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        raise _unwritable(run_dir, error) from None
    try:
        _wait_for_lock(descriptor, run_dir, _SECONDS_OF_LEASE if takes_over else 0.0)
        _write_owner(descriptor)
    except OSError as error:
        os.close(descriptor)
        raise _unwritable(run_dir, error) from None
    except BaseException:
        os.close(descriptor)
        raise
    return _FolderLock(descriptor, with_ranks=with_ranks)


def _wait_for_lock(descriptor: int, run_dir: RunDir, seconds: float) -> None:
    """Lock the folder; wait only for the ranks or the lock of an owner that is dead.

    Args:
        descriptor: The descriptor of owner.lock.
        run_dir: The run folder.
        seconds: How long to wait at least.

    Raises:
        RunDirError: Another process owns the folder.
    """
    start = time.monotonic()
    while (other := _other_owner(descriptor, run_dir, fcntl.LOCK_EX)) is not None:
        if time.monotonic() - start >= max(seconds, _patience_seconds(other)):
            raise _refusal(run_dir, other)
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _patience_seconds(other: Owner | _UnknownOwner) -> float:
    """Return how long to wait for a lock that another process holds."""
    if isinstance(other, _UnknownOwner):
        return _SECONDS_TO_END
    if other.is_dead:
        return _SECONDS_TO_END if other.is_here else _SECONDS_OF_LEASE
    return 0.0 if other.is_here else _SECONDS_OF_A_CHECK


def _other_owner(descriptor: int, run_dir: RunDir, kind: int) -> Owner | _UnknownOwner | None:
    """Try to lock owner.lock; return the owner of the folder, or None if there is no other."""
    locked = try_lock(descriptor, kind)
    owner = read_owner(descriptor)
    if locked is False:
        return owner or _UnknownOwner()
    if owner is None or (locked and locks_are_shared(run_dir.path)):
        return None
    return owner if _seems_alive(owner, run_dir) else None


def _seems_alive(owner: Owner, run_dir: RunDir) -> bool:
    """Return whether an owner whose lock is not visible here appears to be running."""
    if owner.is_here or owner.is_dead:
        return not owner.is_dead
    starting = time.time() - owner.since < SECONDS_TO_START
    return starting or any(map(is_alive, read_heartbeats(run_dir)))


def _refusal(run_dir: RunDir, other: Owner | _UnknownOwner) -> RunDirError:
    """Return the error that names the owner and how to end its run."""
    since, stop, note = "", "stop it", ""
    if isinstance(other, Owner):
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(other.since))
        since = f" since {moment}"
        stop = f"stop it with a checkpoint (`kill {other.pid}` on {other.host})"
        if other.is_dead:
            note = " That process has ended, but ranks that it started have not."
        elif not other.is_here:
            note = (
                f" If {other.host} has crashed, the folder is free after {SECONDS_TO_START:.0f} s."
            )
    return RunDirError(
        f"{run_dir.shown} is in use: {other.words} has owned it{since}.{note} A run folder has "
        f"one owner at a time, and nothing was changed. Wait until the run ends, {stop}, or give "
        "another --out."
    )


def _write_owner(descriptor: int) -> None:
    """Write this process into owner.lock as the owner.

    Raises:
        OSError: owner.lock cannot be written.
    """
    owner = Owner(**asdict(this_process()), inode=os.fstat(descriptor).st_ino)
    text = (encode_json(asdict(owner)) + "\n").encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)
    os.fsync(descriptor)


def _unwritable(run_dir: RunDir, error: OSError) -> RunDirError:
    """Return the error for a run folder that cannot be owned, because nothing can be written."""
    remedy = ""
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = "Copy the run folder to where you can write, and give the copy."
    elif os.path.lexists(run_dir.owner) and not stat.S_ISREG(run_dir.owner.lstat().st_mode):
        remedy = "Remove it, and repeat the command."
    return unwritable_error(run_dir.owner, error, remedy)
