"""Bring what is below a URL up to date with a run folder.

Nothing is uploaded twice: a checkpoint is in the store if it has the same checkpoint.json there,
and a record if the index has its SHA-256. What a killed process has left half-done is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Collection, Mapping
from pathlib import Path

from launcher.errors import CheckpointError, StoreError
from launcher.mirrors.inventory import (
    CHECKPOINTS,
    FileState,
    checkpoint_object,
    list_records,
    upload_order,
)
from launcher.mirrors.object_index import ObjectIndex, write_index
from launcher.mirrors.stored_checkpoints import delete_checkpoint, find_checkpoints
from launcher.object_stores.object_store import ObjectStore
from launcher.regular_file import open_regular, read_regular
from launcher.runs.checkpoints import Checkpoint, list_checkpoints
from launcher.runs.manifest import MANIFEST
from launcher.runs.rundir import RunDir

_MAX_MANIFEST_BYTES = 1 << 28
_BYTES_PER_READ = 1 << 20


class RunMirror:
    """The mirror of a run folder at a URL.

    Args:
        store: The objects below the URL.
        run_dir: The run folder.
        index: The index of the store.
        stored: The SHA-256 of checkpoint.json of each checkpoint in the store, by name.
        partial: The names of checkpoints of which the store has a part.
    """

    def __init__(
        self,
        store: ObjectStore,
        run_dir: RunDir,
        index: ObjectIndex,
        stored: Mapping[str, str],
        partial: Collection[str],
    ) -> None:
        self._store, self._run_dir, self._index = store, run_dir, index
        self._stored, self._partial = dict(stored), set(partial)
        self._seen: dict[str, FileState] = {}
        self._at_start = _inodes(list_checkpoints(run_dir))
        self._inodes: dict[str, int] | None = None
        self._has_uploaded = self._has_new = self._is_claimed = False
        self._has_lost_lock = False
        self.num_objects = 0
        """Number of objects that have been written or deleted so far."""

    @property
    def stored_step(self) -> int | None:
        """The step of the newest checkpoint in the store; None if there is none."""
        return max(map(_step, self._stored), default=None)

    def lose_lock(self) -> None:
        """Write nothing any more, because another process writes to the store now."""
        self._has_lost_lock = True

    def may_write(self) -> bool:
        """Return whether the store still belongs to this process."""
        return not self._has_lost_lock

    def has_new_checkpoints(self) -> bool:
        """Return whether the run folder has other checkpoints than at the last upload."""
        return _inodes(list_checkpoints(self._run_dir)) != self._inodes

    def upload_checkpoints(self) -> None:
        """Upload the checkpoints that the store lacks, the newest first, then remove old ones.

        A checkpoint that the run deletes meanwhile is left out.

        Raises:
            StoreError: The store does not answer, or denies access.
            OSError: A file cannot be read.
        """
        inodes = _inodes(list_checkpoints(self._run_dir))
        for checkpoint in list_checkpoints(self._run_dir):
            try:
                self._upload_checkpoint(checkpoint, inodes.get(checkpoint.name))
            except (OSError, CheckpointError) as error:
                is_damaged = isinstance(error, CheckpointError)  # a resumption says so
                if not is_damaged and checkpoint.path.is_dir():
                    raise
        self._remove_old_checkpoints()
        self._inodes = inodes

    def _upload_checkpoint(self, checkpoint: Checkpoint, inode: int | None) -> None:
        content = read_regular(checkpoint.path / MANIFEST, _MAX_MANIFEST_BYTES)
        digest = hashlib.sha256(content).hexdigest()
        if self._stored.get(checkpoint.name) == digest:
            return
        manifest = checkpoint.read_manifest()
        self._claim()
        if checkpoint.name in self._stored:  # the run was resumed from an earlier one
            self._forget(checkpoint.name)
        self._partial.add(checkpoint.name)
        for name, each in manifest.files.items():
            path, target = checkpoint.path / name, checkpoint_object(checkpoint.name, name)
            self._check_lock()
            self._store.upload(target, path, each.num_bytes)
            self.num_objects += 1
        self._check_lock()
        self._forget_later_than(checkpoint.step)
        self._store.write(checkpoint_object(checkpoint.name, MANIFEST), content)
        self.num_objects += 1
        self._partial.remove(checkpoint.name)
        self._stored[checkpoint.name] = digest
        self._has_uploaded = True
        self._has_new |= self._at_start.get(checkpoint.name) != inode

    def _forget_later_than(self, step: int) -> None:
        """Remove checkpoint.json of checkpoints that the run has given up by resuming before them.

        Otherwise they would be the newest ones.
        """
        local = {each.name for each in list_checkpoints(self._run_dir)}
        for name in sorted(self._stored.keys() - local):
            if _step(name) > step:
                self._forget(name)

    def _forget(self, name: str) -> None:
        self._store.delete(checkpoint_object(name, MANIFEST))
        self.num_objects += 1
        del self._stored[name]
        self._partial.add(name)

    def _remove_old_checkpoints(self) -> None:
        """Remove checkpoints that the run has deleted, once the store has a newer one from here.

        Later ones, which a run gives up by resuming before them, stay until it has saved a new one:
        before that, the resumption may still be refused.
        """
        local = {each.name for each in list_checkpoints(self._run_dir)}
        gone = (self._stored.keys() | self._partial) - local
        if not self._has_new:
            newest = max(map(_step, self._stored.keys() & local), default=0)
            gone = {name for name in gone if self._has_uploaded and _step(name) < newest}
        if not gone:
            return
        for each in find_checkpoints(self._store.list(CHECKPOINTS)):
            if each.name in gone:
                delete_checkpoint(self._store, each)
                self.num_objects += 1
        for name in gone:
            self._stored.pop(name, None)
            self._partial.discard(name)

    def upload_records(self) -> None:
        """Upload the records that differ from those in the store, and remove those that are gone.

        Raises:
            StoreError: The store does not answer, or denies access.
        """
        records = list_records(self._run_dir)
        digests: dict[str, str] = {}
        sizes: dict[str, FileState] = {}
        for name in upload_order(records):
            if self._seen.get(name) == records[name] and name in self._index.files:
                continue
            with contextlib.suppress(OSError):  # removed or shortened meanwhile
                digest = _sum_first(self._run_dir.path / name, records[name].num_bytes)
                if self._index.holds(name, digest):
                    self._seen[name] = records[name]
                else:
                    digests[name], sizes[name] = digest, records[name]
        gone = sorted(self._index.files.keys() - records.keys())
        if not digests and not gone:
            return
        self._save_index(self._index.before(digests).without(gone))
        uploaded = {}
        for name, digest in digests.items():
            self._check_lock()
            with contextlib.suppress(OSError):
                self._store.upload(name, self._run_dir.path / name, sizes[name].num_bytes)
                self.num_objects += 1
                uploaded[name], self._seen[name] = digest, sizes[name]
        for name in gone:
            self._store.delete(name)
        self._save_index(self._index.after(uploaded))

    def _check_lock(self) -> None:
        """Refuse to write what belongs to another process.

        Raises:
            StoreError: It does.
        """
        if self._has_lost_lock:
            raise StoreError(f"{self._store.shown} belongs to another process now.")

    def _claim(self) -> None:
        """Name this session in the index, before anything else is written."""
        if not self._is_claimed:
            self._save_index(self._index)

    def _save_index(self, index: ObjectIndex) -> None:
        self._check_lock()
        write_index(self._store, index)
        self._is_claimed = True
        self.num_objects += 1
        self._index = index


def _step(name: str) -> int:
    """Return the step of a checkpoint by its name."""
    return int(name.removeprefix("step-"))


def _inodes(checkpoints: list[Checkpoint]) -> dict[str, int]:
    """Return what tells the folders of checkpoints from others of the same names."""
    inodes = {}
    for checkpoint in checkpoints:
        with contextlib.suppress(OSError):
            inodes[checkpoint.name] = checkpoint.path.stat().st_ino
    return inodes


def _sum_first(path: Path, num_bytes: int) -> str:
    """Return the SHA-256 of the first bytes of a file, to which more may be appended meanwhile.

    Raises:
        OSError: It cannot be read, or is shorter.
    """
    digest = hashlib.sha256()
    with io.BufferedReader(open_regular(path)) as file:
        while num_bytes > 0 and (block := file.read(min(num_bytes, _BYTES_PER_READ))):
            digest.update(block)
            num_bytes -= len(block)
    if num_bytes:
        raise OSError(f"{path} has become shorter while it was read")
    return digest.hexdigest()
