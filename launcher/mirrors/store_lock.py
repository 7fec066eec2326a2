"""mirror.lock: one process at a time writes below a URL.

The object names its owner and is written again every 15 seconds. The lock of an owner that has
ended is taken at once where that can be known: on the owner's machine, and in a requeued Slurm job.
Elsewhere it is taken when it has not been written for a minute by the clock of the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace

from launcher.errors import StoreError
from launcher.json_file import Count, DamagedJSONError, decode_json, encode_json
from launcher.mirrors.inventory import LOCK
from launcher.object_stores.object_store import ObjectStore
from launcher.runs.process_owner import ProcessOwner

SECONDS_BETWEEN_WRITES = 15.0
"""How often an owner writes its lock."""

LEASE_SECONDS = 60.0
"""Age at which the lock of an owner that cannot be looked up is free."""

_SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True, kw_only=True)
class Lock:
    """The content of mirror.lock."""

    session: str
    """Id of the process that mirrors the run."""

    owner: ProcessOwner
    """The process that trains."""

    count: Count = 0
    """How often the lock has been written again, so that others see that its owner is alive."""


class LostLockError(StoreError):
    """Another process has taken the lock; nothing may be written any more."""


class StoreLock:
    """The lock on what is below a URL.

    Args:
        store: The store.
        session: Id of this process.
        owner: The process that trains.
    """

    def __init__(self, store: ObjectStore, session: str, owner: ProcessOwner) -> None:
        self._store = store
        self._lock = Lock(session=session, owner=owner)

    def acquire(
        self,
        now: float | None,
        announce: Callable[[str], object],
        lost: Collection[str] = (),
    ) -> None:
        """Take the lock; wait for a minute if it is unknown whether its owner is alive.

        Args:
            now: The time by the clock of the store, in seconds since 1970; None if it has none.
            announce: Called with a text before this waits.
            lost: Ids of processes that are known to have ended, whose lock is taken at once.

        Raises:
            StoreError: Another process owns the lock, or the store does not answer.
        """
        started = time.monotonic()
        seen: bytes | None = None
        while not self._store.create(LOCK, _encoded(self._lock)):
            content = self._content()
            if content is None:  # released meanwhile
                continue
            other = _decoded(content)
            if other is not None and self._is_free(other, lost):
                self._remove(content)
                continue
            elapsed = time.monotonic() - started
            age = elapsed if now is None else now + elapsed - self._modified(now)
            is_alive = other is not None and other.owner.is_here
            if is_alive or (seen is not None and content != seen):
                raise self._refusal(other)
            if age > LEASE_SECONDS:
                self._remove(content)
                continue
            if seen is None:
                who = "another process" if other is None else other.owner.words
                announce(
                    f"{self._store.shown} was in use by {who} {max(age, 0):.0f} s ago: waiting up "
                    f"to {LEASE_SECONDS - age:.0f} s to see whether it still is"
                )
            seen = content
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def refresh(self) -> None:
        """Write the lock again.

        Raises:
            LostLockError: Another process has taken it.
            StoreError: The store does not answer.
        """
        content = self._content()
        other = None if content is None else _decoded(content)
        if other is None or other.session != self._lock.session:
            who = "" if other is None else f" {other.owner.words} has taken it over."
            raise LostLockError(
                f"{self._store.shown} no longer belongs to this run: its {LOCK} is gone.{who} "
                "Nothing more is uploaded."
            )
        self._lock = replace(self._lock, count=self._lock.count + 1)
        self._store.write(LOCK, _encoded(self._lock))

    def release(self) -> None:
        """Give up the lock if this process has it.

        Raises:
            StoreError: The store does not answer.
        """
        content = self._content()
        other = None if content is None else _decoded(content)
        if other is not None and other.session == self._lock.session:
            self._store.delete(LOCK)

    def _is_free(self, other: Lock, lost: Collection[str]) -> bool:
        """Return whether the owner has ended, or was an earlier mirror of the same run."""
        is_known = other.owner.is_dead or other.session in lost
        return is_known or other.owner == self._lock.owner

    def _content(self) -> bytes | None:
        try:
            return self._store.read(LOCK)
        except StoreError as error:
            if error.kind != "missing":
                raise
            return None

    def _modified(self, now: float) -> float:
        try:
            modified = self._store.modified(LOCK)
        except StoreError as error:
            if error.kind != "missing":
                raise
            return now
        return now if modified is None else modified

    def _remove(self, content: bytes) -> None:
        """Remove the lock of an owner that has ended, unless it has been replaced meanwhile."""
        if self._content() == content:
            self._store.delete(LOCK)

    def _refusal(self, other: Lock | None) -> StoreError:
        who = "another process" if other is None else other.owner.words
        return StoreError(
            f"{self._store.shown} is in use: {who} writes there. A URL has one run, and a run has "
            "one owner at a time. Wait until that run ends, stop it, or give another URL."
        )


def read_lock(store: ObjectStore) -> Lock | None:
    """Return the lock of a store, or None if there is none or it is damaged.

    Raises:
        StoreError: The store does not answer.
    """
    try:
        return _decoded(store.read(LOCK))
    except StoreError as error:
        if error.kind != "missing":
            raise
        return None


def _encoded(lock: Lock) -> bytes:
    return (encode_json(asdict(lock)) + "\n").encode()


def _decoded(content: bytes) -> Lock | None:
    try:
        return decode_json(content, Lock)
    except DamagedJSONError:
        return None
