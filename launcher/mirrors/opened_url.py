"""Take a URL for a run, and refuse before its first step whatever could be wrong with it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from launcher.errors import StoreError
from launcher.mirrors.inventory import LOCK, RECORD
from launcher.mirrors.object_index import ObjectIndex, read_index
from launcher.mirrors.run_mirror import RunMirror
from launcher.mirrors.store_lock import StoreLock
from launcher.mirrors.stored_checkpoints import find_checkpoints, stored_digests
from launcher.object_stores.object_store import ObjectStore, StoredObject
from launcher.runs.process_owner import ProcessOwner
from launcher.runs.rundir import RunDir

_PROBE = ".probe-"


@dataclass(frozen=True, kw_only=True)
class OpenedURL:
    """A URL that this process may write to."""

    store: ObjectStore
    lock: StoreLock
    index: ObjectIndex
    """The index that is written first, with the id of this process."""

    stored: Mapping[str, str]
    """The SHA-256 of checkpoint.json of each checkpoint that is there, by name."""

    partial: Collection[str]
    """The names of checkpoints of which only a part is there."""

    def mirror(self, run_dir: RunDir) -> RunMirror:
        """Return the mirror of a run folder here."""
        return RunMirror(self.store, run_dir, self.index, self.stored, self.partial)


def open_url(
    store: ObjectStore,
    owner: ProcessOwner,
    sessions: Collection[str],
    announce: Callable[[str], object],
    *,
    takes_over: bool = False,
) -> OpenedURL:
    """Check that a URL can be written to and holds no other run, and lock it.

    Args:
        store: The objects below the URL.
        owner: The process that trains.
        sessions: The sessions of the run that is mirrored there; empty for a new run.
        announce: Called with a text before this waits for a lock.
        takes_over: Whether the processes of `sessions` are known to have ended.

    Raises:
        StoreError: The store does not answer or denies access, another process owns the URL, or it
            holds something else.
    """
    session = secrets.token_hex(8)
    now = _probe(store, session)
    lock = StoreLock(store, session, owner)
    lock.acquire(now, announce, sessions if takes_over else ())
    try:
        listed = {
            name: each
            for name, each in store.list().items()
            if name != LOCK and not name.startswith(_PROBE)
        }
        index = read_index(store, listed)
        _check_content(store, listed, index, sessions)
        stored = stored_digests(store, listed)
    except BaseException:
        with contextlib.suppress(StoreError):
            lock.release()
        raise
    files = {} if index is None else index.files
    return OpenedURL(
        store=store,
        lock=lock,
        index=ObjectIndex(session=session, files=files),
        stored=stored,
        partial={each.name for each in find_checkpoints(listed)} - stored.keys(),
    )


def check_writable(
    store: ObjectStore, owner: ProcessOwner, announce: Callable[[str], object]
) -> None:
    """Check that a URL can be written to and that no other process owns it, before a download.

    Raises:
        StoreError: The store does not answer or denies access, or another process owns the URL.
    """
    session = secrets.token_hex(8)
    now = _probe(store, session)
    lock = StoreLock(store, session, owner)
    lock.acquire(now, announce)
    lock.release()


def _probe(store: ObjectStore, session: str) -> float | None:
    """Write, find and delete an object; return the time by the clock of the store.

    Raises:
        StoreError: One of them is not possible.
    """
    name = f"{_PROBE}{session}"
    store.write(name, b"launcher may write, read and delete objects here\n")
    modified = store.modified(name)
    store.delete(name)
    return modified


def _check_content(
    store: ObjectStore,
    listed: Mapping[str, StoredObject],
    index: ObjectIndex | None,
    sessions: Collection[str],
) -> None:
    """Refuse a URL that holds something else than the run that is mirrored there.

    Raises:
        StoreError: It does.
    """
    if not listed or (index is not None and index.session in sessions):
        return
    if index is not None and sessions:
        raise StoreError(
            f"The run at {store.shown} was continued from elsewhere since this run folder was "
            f"written, and uploading would undo that. `launcher resume {store.shown}` continues "
            "from there."
        )
    if index is not None and RECORD in listed:
        raise StoreError(
            f"{store.shown} holds a run already, and a run never replaces another one. `launcher "
            f"resume {store.shown}` resumes it. Give another URL for a new run."
        )
    raise StoreError(
        f"{store.shown} is not empty: it has {len(listed):,} objects, such as "
        f"{min(listed)}. Give the URL of a folder that does not exist yet."
    )
