"""The runs below a URL, each with the records from which its state is read."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.mirrors.inventory import LOCK, RECORD, RESULT
from launcher.mirrors.store_lock import LEASE_SECONDS
from launcher.object_stores.object_store import ObjectStore, StoredObject
from launcher.runs.rundir import RunDir

_RECORDS = (RECORD, RESULT, "metrics.jsonl", "events.jsonl", "failure.json")
_TAIL_BYTES = 1 << 16
"""Bytes that are read of the end of a file that grows."""

_MAX_DEPTH = 3
"""Levels below the URL that are searched, as in a folder."""


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run in a store."""

    url: str
    """Its URL."""

    run_dir: RunDir
    """A temporary folder with the records of its state, and only the end of metrics.jsonl."""

    is_owned: bool
    """Whether a process has written its lock within a minute."""


def read_runs(store: ObjectStore) -> Iterator[StoredRun]:
    """Yield the runs below a URL in the order of their names, or the run at the URL itself.

    A temporary folder is removed when the next run is yielded.

    Raises:
        StoreError: The store denies access or does not answer.
    """
    listed = store.list()
    names = [name for name in listed if name == RECORD or name.endswith(f"/{RECORD}")]
    found: list[str] = []
    for prefix in sorted(name.removesuffix(RECORD) for name in names):
        is_inside = any(prefix.startswith(other) for other in found)
        if not is_inside and prefix.count("/") <= _MAX_DEPTH:
            found.append(prefix)
    for prefix in found:
        with tempfile.TemporaryDirectory(prefix="launcher-listing-") as folder:
            for name in _RECORDS:
                _fetch(store, listed, f"{prefix}{name}", Path(folder) / name)
            yield StoredRun(
                url=f"{store.url}/{prefix}".rstrip("/"),
                run_dir=RunDir(Path(folder)),
                is_owned=_is_recent(listed.get(f"{prefix}{LOCK}")),
            )


def _fetch(store: ObjectStore, listed: Mapping[str, StoredObject], name: str, path: Path) -> None:
    """Write a record to a file that was written when the object was; nothing if it is missing.

    Of a long file that grows, only the end is read.
    """
    stored = listed.get(name)
    if stored is None:
        return
    start = max(stored.num_bytes - _TAIL_BYTES, 0) if name.endswith(".jsonl") else 0
    with path.open("wb") as file:
        file.truncate(start)
        file.seek(start)
        file.write(store.read_range(name, start, stored.num_bytes))
    if stored.modified is not None:
        os.utime(path, (stored.modified, stored.modified))


def _is_recent(lock: StoredObject | None) -> bool:
    if lock is None:
        return False
    return lock.modified is None or time.time() - lock.modified < LEASE_SECONDS
