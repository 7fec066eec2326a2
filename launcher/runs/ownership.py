"""Ownership of a run folder: one launcher writes into it at a time.

The owner holds a lock (flock) on owner.lock in the run folder, and the file says who the owner is.
The kernel releases the lock when the owner and its ranks have ended, whatever ended them, so a run
that was killed can be resumed at once.

Some file systems have no such locks, or do not share them between machines. There the text of
owner.lock decides: a process of this machine is looked up, and a process of another machine counts
as alive while its ranks write heartbeats. Two launchers that start within the same moment on two
machines can both pass this weaker check.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from launcher.errors import RunDirError
from launcher.runs.heartbeat import read_heartbeats
from launcher.runs.locks import locks_are_shared, try_lock
from launcher.runs.provenance import command_line
from launcher.runs.rundir import RunDir
from launcher.runs.status import SECONDS_TO_START, is_alive

_SECONDS_TO_END = 10.0
"""Ranks whose launcher was killed are gone after this time; a GPU takes seconds to be released."""

_SECONDS_OF_LEASE = 120.0
"""An NFS server forgets the locks of a machine that has crashed after 90 seconds."""

_SECONDS_OF_A_LOOK = 1.0
"""`check_unowned` holds the lock for a moment; this is more than enough for it."""

_SECONDS_BETWEEN_TRIES = 0.1
_LONGEST = 1 << 16
"""Bytes of owner.lock that are read."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that owns a run folder, as owner.lock describes it."""

    host: str
    """Name of its machine."""

    place: str
    """Boot and process namespace of that machine, within which `pid` has a meaning."""

    pid: int
    started: int
    """When the process started, in the kernel's clock ticks: a later process has the same `pid`."""

    since: float
    """When it became the owner, in seconds since 1970."""

    job: str | None
    """Slurm's job id; None outside of Slurm."""

    restarts: int
    """How often Slurm had requeued that job."""

    command: str
    inode: int
    """Of owner.lock: a copied run folder does not have the owner of the original."""

    @property
    def is_here(self) -> bool:
        """Whether the owner's process can be looked up from this process."""
        return self.place == _place()

    @property
    def is_dead(self) -> bool:
        """Whether the owner has certainly ended."""
        if self.is_here:
            return _started(self.pid) != self.started
        job, restarts = _job()
        return job is not None and self.job == job and self.restarts < restarts

    @property
    def words(self) -> str:
        """Who it is."""
        job = f"job {self.job} on " if self.job is not None else ""
        return f"{job}{self.host} (pid {self.pid})"


@contextlib.contextmanager
def own(run_dir: RunDir, *, with_ranks: bool = False) -> Iterator[None]:
    """Own a run folder; refuse where another process owns it, and change nothing then.

    Args:
        run_dir: The folder, which exists.
        with_ranks: Whether processes that this one forks keep the folder owned after the death of
            this process, until they have ended as well. Their own children never do.

    Raises:
        RunDirError: Another process owns it, or owner.lock cannot be written.
    """
    held = _take(run_dir, with_ranks=with_ranks)
    try:
        yield
    finally:
        held.release()


def check_unowned(path: Path) -> None:
    """Refuse a run folder that another process owns; write nothing in any case.

    This is an early answer only: `own` decides.

    Raises:
        RunDirError: Another process owns it.
    """
    run_dir = RunDir(path.resolve())
    try:
        descriptor = os.open(run_dir.owner, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        other = _other_owner(descriptor, run_dir, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)
    if other is not None and not (isinstance(other, Owner) and other.is_dead):
        raise _refusal(run_dir, other)


class _Unknown:
    """Somebody who holds the lock, and about whom owner.lock says nothing."""

    words = "another process"


class _Held:
    """The lock of a run folder that this process owns."""

    def __init__(self, descriptor: int, *, with_ranks: bool) -> None:
        self._descriptor, self._with_ranks = descriptor, with_ranks
        self._pid = os.getpid()
        _all_held.append(self)

    def release(self) -> None:
        """Own it no longer. The lock stays until ranks that share it have ended."""
        if self not in _all_held or os.getpid() != self._pid:
            return
        _all_held.remove(self)
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def forked(self) -> None:
        """Keep the lock in a rank, and drop it in any other forked process.

        A DataLoader worker outlives a killed rank by seconds, and other children of a rank may live
        for ever.
        """
        if self._with_ranks and os.getppid() == self._pid:
            return
        _all_held.remove(self)
        os.close(self._descriptor)


_all_held: list[_Held] = []


def _in_forked_process() -> None:
    for held in tuple(_all_held):
        held.forked()


os.register_at_fork(after_in_child=_in_forked_process)


def _take(run_dir: RunDir, *, with_ranks: bool) -> _Held:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(run_dir.owner, flags, 0o666)
    except OSError as error:
        raise RunDirError(f"Cannot write {run_dir.owner}: {error.strerror}.") from None
    try:
        _wait_for(descriptor, run_dir)
        _write(descriptor)
    except OSError as error:
        os.close(descriptor)
        raise RunDirError(f"Cannot write {run_dir.owner}: {error.strerror}.") from None
    except BaseException:
        os.close(descriptor)
        raise
    return _Held(descriptor, with_ranks=with_ranks)


def _wait_for(descriptor: int, run_dir: RunDir) -> None:
    """Lock the folder. Wait for what is left of an owner that is dead, and for nobody else.

    Raises:
        RunDirError: Another process owns it.
    """
    begun = time.monotonic()
    while (other := _other_owner(descriptor, run_dir, fcntl.LOCK_EX)) is not None:
        if time.monotonic() - begun >= _patience(other):
            raise _refusal(run_dir, other)
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _patience(other: Owner | _Unknown) -> float:
    """Return for how many seconds to wait for a lock that somebody holds."""
    if isinstance(other, _Unknown):
        return _SECONDS_TO_END
    if other.is_dead:
        return _SECONDS_TO_END if other.is_here else _SECONDS_OF_LEASE
    return 0.0 if other.is_here else _SECONDS_OF_A_LOOK


def _other_owner(descriptor: int, run_dir: RunDir, kind: int) -> Owner | _Unknown | None:
    """Try to lock owner.lock; return who owns the folder, or None where nobody else does."""
    locked = try_lock(descriptor, kind)
    said = _read(descriptor)
    if locked is False:
        return said or _Unknown()
    if said is None or (locked and locks_are_shared(run_dir.path)):
        return None
    return said if _seems_alive(said, run_dir) else None


def _seems_alive(owner: Owner, run_dir: RunDir) -> bool:
    """Return whether an owner whose lock cannot be seen is at work, as far as that is known."""
    if owner.is_here or owner.is_dead:
        return not owner.is_dead
    starting = time.time() - owner.since < SECONDS_TO_START
    return starting or any(map(is_alive, read_heartbeats(run_dir)))


def _refusal(run_dir: RunDir, other: Owner | _Unknown) -> RunDirError:
    since, stop, note = "", "stop it", ""
    if isinstance(other, Owner):
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(other.since))
        since = f" since {moment}"
        stop = f"stop it with a checkpoint (`kill {other.pid}` on {other.host})"
        if other.is_dead:
            note = " That process has ended, and ranks that it started have not."
        elif not other.is_here:
            note = (
                f" If {other.host} has crashed, the folder is free after {SECONDS_TO_START:.0f} s."
            )
    return RunDirError(
        f"{run_dir.shown} is at work: {other.words} has owned it{since}.{note} A run folder has "
        f"one owner at a time, and nothing was changed. Wait until it ends, {stop}, or give "
        "another --out."
    )


def _read(descriptor: int) -> Owner | None:
    """Return what owner.lock says; None where it names nobody."""
    try:
        owner = msgspec.json.decode(os.pread(descriptor, _LONGEST, 0), type=Owner)
    except msgspec.DecodeError:
        return None
    return owner if owner.inode == os.fstat(descriptor).st_ino else None


def _write(descriptor: int) -> None:
    """Say in owner.lock that this process is the owner."""
    job, restarts = _job()
    owner = Owner(
        host=platform.node(),
        place=_place(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0,
        since=time.time(),
        job=job,
        restarts=restarts,
        command=shlex.join(command_line()),
        inode=os.fstat(descriptor).st_ino,
    )
    text = (json.dumps(asdict(owner)) + "\n").encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)
    os.fsync(descriptor)


def _job() -> tuple[str | None, int]:
    """Return the Slurm job of this process, if any, and how often it was requeued."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return os.environ.get("SLURM_JOB_ID"), int(restarts) if restarts.isdigit() else 0


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{platform.node()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return platform.node()


def _started(pid: int) -> int | None:
    """Return when a process of this machine started; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
