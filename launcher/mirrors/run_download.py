"""Download a run from a store to a new folder, and verify the SHA-256 of everything."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.errors import CheckpointError, RunDirError, StoreError
from launcher.mirrors.inventory import CHECKPOINTS, INDEX, LOCK, RECORD, checkpoint_object
from launcher.mirrors.object_index import ObjectIndex, read_index
from launcher.mirrors.stored_checkpoints import (
    StoredCheckpoint,
    find_checkpoints,
    read_stored_manifest,
)
from launcher.object_stores.object_store import ObjectStore, StoredObject
from launcher.printable import printable_line, shortened
from launcher.quantities import size
from launcher.recipe.text_values import digits
from launcher.runs.checkpoints import begin_checkpoint
from launcher.runs.manifest import MANIFEST
from launcher.runs.mirror_record import MirrorRecord, write_mirror
from launcher.runs.rundir import RunDir, create_run_dir

_CODE = "code/"
_RESERVED = frozenset({CHECKPOINTS, INDEX, LOCK, "mirror.json", "owner.lock"})


@dataclass(frozen=True, kw_only=True)
class DownloadChoice:
    """What is downloaded besides the records of a run."""

    checkpoint: str | None = None
    """The name of a checkpoint, such as 120; None is the newest."""

    fall_back: bool = False
    """Whether an older checkpoint is taken if this one is damaged."""

    leaves_out_checkpoints: bool = False
    """Whether no checkpoint is downloaded."""


def has_run(store: ObjectStore) -> bool:
    """Return whether a store holds a run.

    Raises:
        StoreError: The store does not answer, or denies access.
    """
    return RECORD in store.list()


def download_run(
    store: ObjectStore,
    out: Path,
    choice: DownloadChoice,
    announce: Callable[[str], object],
) -> RunDir:
    """Download a run to a new folder, which is complete or is not left behind.

    Args:
        store: The objects of the run.
        out: The folder to make.
        choice: Which checkpoint is downloaded with it.
        announce: Called with a text for the user about what is downloaded, and what is left out.

    Raises:
        StoreError: There is no run, the store does not answer, or an object without which the run
            cannot be resumed is damaged.
        CheckpointError: The checkpoint does not exist or is damaged.
        RunDirError: The folder exists or cannot be written.
    """
    listed = store.list()
    index = read_index(store, listed)
    if index is None or RECORD not in listed:
        raise StoreError(
            f"There is no run at {store.shown}. Give the URL that its `launcher run` was given; "
            f"`launcher runs {store.shown}` lists the runs below it."
        )
    run_dir = create_run_dir(out, out.name)
    try:
        _download_records(store, listed, index, run_dir, announce)
        if not choice.leaves_out_checkpoints:
            _download_checkpoint(store, listed, choice, run_dir, announce)
        write_mirror(run_dir, MirrorRecord(url=store.url, sessions=(index.session,)))
    except OSError as error:
        shutil.rmtree(run_dir.path, ignore_errors=True)
        raise RunDirError(
            f"{store.shown} cannot be downloaded to {run_dir.path}: {error.strerror or error}."
        ) from None
    except BaseException:
        shutil.rmtree(run_dir.path, ignore_errors=True)
        raise
    return run_dir


def _download_records(
    store: ObjectStore,
    listed: Mapping[str, StoredObject],
    index: ObjectIndex,
    run_dir: RunDir,
    announce: Callable[[str], object],
) -> None:
    for name in sorted(index.files):
        digests = index.files[name]
        if not _is_below(name) or (name not in listed and "" in digests):
            continue
        problem = _download_record(store, listed.get(name), name, digests, run_dir)
        if not problem:
            continue
        text = f"{store.shown}/{printable_line(shortened(name, 200))} {problem}"
        if name == RECORD or name.startswith(_CODE):
            raise StoreError(f"{text}. Without it the run cannot be resumed.")
        announce(f"{text}, and is left out")


def _download_record(
    store: ObjectStore,
    stored: StoredObject | None,
    name: str,
    digests: Sequence[str],
    run_dir: RunDir,
) -> str:
    """Download a record; return how it is damaged, in which case there is no file."""
    if stored is None:
        return "is missing"
    path = run_dir.path / name
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if store.download(name, stored.num_bytes, path) in digests:
        return ""
    path.unlink()
    return "is not what was uploaded (SHA-256)"


def _is_below(name: str) -> bool:
    """Return whether a name of an index is that of a record, below the run folder."""
    path = PurePosixPath(name)
    is_plain = not path.is_absolute() and ".." not in path.parts and path.parts
    return bool(is_plain) and path.parts[0] not in _RESERVED and "\0" not in name


def _download_checkpoint(
    store: ObjectStore,
    listed: Mapping[str, StoredObject],
    choice: DownloadChoice,
    run_dir: RunDir,
    announce: Callable[[str], object],
) -> None:
    committed = [each for each in find_checkpoints(listed) if each.is_committed]
    candidates = _chosen(store, committed, choice.checkpoint)
    for number, stored in enumerate(candidates):
        earlier = candidates[number + 1 :]
        damage = _download_one(store, stored, run_dir, announce)
        if not damage:
            return
        text = f"{store.shown}/{CHECKPOINTS}/{stored.name} is damaged: {damage}."
        if not (choice.fall_back and earlier):
            raise CheckpointError(f"{text} {_remedy(earlier)}")
        announce(f"{text} {earlier[0].name} is taken instead")


def _chosen(
    store: ObjectStore, committed: list[StoredCheckpoint], name: str | None
) -> list[StoredCheckpoint]:
    """Return the checkpoint of a name, or the newest, and those before it.

    Raises:
        CheckpointError: There is none of that name.
    """
    if name is None:
        return committed
    step = digits(name.removeprefix("step-"))
    if all(each.step != step for each in committed):
        names = ", ".join(each.name for each in committed)
        raise CheckpointError(
            f"{store.shown} has no checkpoint {printable_line(shortened(name, 60))}. Its "
            f"checkpoints: {names or 'none'}."
        )
    return [each for each in committed if step is not None and each.step <= step]


def _remedy(earlier: Sequence[StoredCheckpoint]) -> str:
    if not earlier:
        return "There is no earlier checkpoint."
    return (
        f"The checkpoint before it is {earlier[0].name}: add `--from {earlier[0].name}`, or "
        "--auto for the newest undamaged one."
    )


def _download_one(
    store: ObjectStore,
    stored: StoredCheckpoint,
    run_dir: RunDir,
    announce: Callable[[str], object],
) -> str:
    """Download a checkpoint; return how it is damaged, in which case there is no folder."""
    try:
        content, manifest = read_stored_manifest(store, stored)
    except CheckpointError as error:
        return str(error)
    num_bytes = sum(each.num_bytes for each in manifest.files.values())
    announce(f"downloading {stored.name} ({size(num_bytes)}) of {store.shown}")
    folder = begin_checkpoint(run_dir, stored.step)
    with contextlib.ExitStack() as removal:
        removal.callback(shutil.rmtree, folder, ignore_errors=True)
        for name, each in manifest.files.items():
            if PurePosixPath(name).name != name:
                return f"{printable_line(shortened(name, 100))}: not the name of a file"
            if stored.files.get(name) != each.num_bytes:
                found = stored.files.get(name)
                actual = "missing" if found is None else f"{found:,} bytes"
                return f"{name}: {actual} instead of {each.num_bytes:,} bytes"
            target = checkpoint_object(stored.name, name)
            if store.download(target, each.num_bytes, folder / name) != each.sha256:
                return f"{name}: not the bytes that were uploaded (SHA-256)"
        (folder / MANIFEST).write_bytes(content)
        folder.rename(folder.with_name(stored.name))
        removal.pop_all()
    return ""
