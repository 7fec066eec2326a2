"""The checkpoints in a store: each exists once its checkpoint.json does, which is written last."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import CheckpointError
from launcher.mirrors.inventory import CHECKPOINTS, checkpoint_object
from launcher.object_stores.object_store import ObjectStore, StoredObject
from launcher.runs.checkpoints import Checkpoint
from launcher.runs.manifest import MANIFEST, Manifest

_OBJECT = re.compile(rf"{CHECKPOINTS}/(step-(\d{{8,}}))/([^/]+)")


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """The objects of one checkpoint."""

    name: str
    """Its name, such as `step-00000120`."""

    step: int
    """The step after which it was saved."""

    files: Mapping[str, int]
    """The size of each of its objects in bytes, by the name of the file."""

    @property
    def is_committed(self) -> bool:
        """Whether all of it was uploaded once: its checkpoint.json is there."""
        return MANIFEST in self.files

    def is_whole(self, manifest: Manifest) -> bool:
        """Return whether every file of the manifest is there with its size."""
        return all(self.files.get(name) == each.num_bytes for name, each in manifest.files.items())


def find_checkpoints(listed: Mapping[str, StoredObject]) -> list[StoredCheckpoint]:
    """Return the checkpoints among the objects of a store, committed or not, the newest first."""
    files: dict[tuple[int, str], dict[str, int]] = {}
    for name, each in listed.items():
        if match := _OBJECT.fullmatch(name):
            files.setdefault((int(match[2]), match[1]), {})[match[3]] = each.num_bytes
    return [
        StoredCheckpoint(name=name, step=step, files=files[step, name])
        for step, name in sorted(files, reverse=True)
    ]


def read_stored_manifest(store: ObjectStore, stored: StoredCheckpoint) -> tuple[bytes, Manifest]:
    """Return a stored checkpoint.json, as bytes and as the manifest that it holds.

    Raises:
        CheckpointError: It is damaged, or belongs to another step.
        StoreError: It cannot be read.
    """
    content = store.read(checkpoint_object(stored.name, MANIFEST))
    with tempfile.TemporaryDirectory(prefix="launcher-manifest-") as folder:
        (Path(folder) / MANIFEST).write_bytes(content)
        manifest = Checkpoint(stored.step, Path(folder)).read_manifest()
    return content, manifest


def delete_checkpoint(store: ObjectStore, stored: StoredCheckpoint) -> None:
    """Delete a checkpoint: first its checkpoint.json, so that half of it is none.

    Raises:
        StoreError: An object cannot be deleted.
    """
    for file in sorted(stored.files, key=lambda file: file != MANIFEST):
        store.delete(checkpoint_object(stored.name, file))


def stored_digests(store: ObjectStore, listed: Mapping[str, StoredObject]) -> dict[str, str]:
    """Return the SHA-256 of the checkpoint.json of each checkpoint that is whole, by name.

    Raises:
        StoreError: A checkpoint.json cannot be read.
    """
    digests = {}
    for stored in find_checkpoints(listed):
        if not stored.is_committed:
            continue
        try:
            content, manifest = read_stored_manifest(store, stored)
        except CheckpointError:
            continue  # it is uploaded again
        if stored.is_whole(manifest):
            digests[stored.name] = hashlib.sha256(content).hexdigest()
    return digests
