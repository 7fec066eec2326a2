"""The checkpoints of a run: list, read, verify, write and prune them.

    checkpoints/step-00000120/
        checkpoint.json        the manifest: position in the run, size and SHA-256 of every other
                               file, and the SHA-256 of its own content
        shard-*.safetensors    weights, optimizer state and buffers; one rank's part each

A folder gets its name when all of its content is on the disk. The name of a folder that is still
being written begins with a dot. A resumed run appends `.set-aside` to the names of the checkpoints
that were saved after the one it resumed from.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import CheckpointError
from launcher.printable import printable_line, shortened
from launcher.recipe.text_values import digits
from launcher.recipe.validation import brief
from launcher.regular_file import size_of
from launcher.runs.manifest import MANIFEST, Manifest, load_manifest, save_manifest, sum_file
from launcher.runs.rundir import RunDir

_NAME = re.compile(r"step-(\d{8,})")
_SET_ASIDE = ".set-aside"


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A checkpoint on the disk, which was complete when its folder got its name."""

    step: int
    """The optimizer step after which it was saved."""

    path: Path
    """The folder."""

    @property
    def name(self) -> str:
        """Name of the folder, such as `step-00000120`."""
        return self.path.name

    def read_manifest(self) -> Manifest:
        """Return the content of checkpoint.json.

        Raises:
            CheckpointError: checkpoint.json is missing or damaged, has a format that this version
                does not read, or belongs to another step.
        """
        manifest = load_manifest(self.path)
        if manifest.step != self.step:
            raise CheckpointError(
                f"{MANIFEST}: it belongs to step {manifest.step}, the folder to step {self.step}"
            )
        return manifest

    def find_damage(self, files: Iterable[str], manifest: Manifest) -> Iterator[str]:
        """Yield one message per damaged file.

        Args:
            files: Names of the files to read, each from beginning to end.
            manifest: The manifest, which holds their sizes and digests.
        """
        for name in files:
            expected, shown = manifest.files[name], printable_line(shortened(name, 100))
            if Path(name).name != name:
                yield f"{shown}: not the name of a file in this folder"
                continue
            try:
                num_bytes = size_of(self.path / name)
                # A file of another size, which may be far too large, is not read.
                actual = sum_file(self.path / name) if num_bytes == expected.num_bytes else None
            except OSError as error:
                yield f"{shown}: {error.strerror or error}"
                continue
            if actual is None:
                yield f"{shown}: {num_bytes:,} bytes instead of {expected.num_bytes:,}"
            elif actual != expected:
                yield f"{shown}: not the bytes that were written (SHA-256)"

    def find_unlisted(self, manifest: Manifest) -> Iterator[str]:
        """Yield one message per shard that the manifest does not list, or if it lists no file.

        Such a shard would be loaded without having been verified.
        """
        shards = {path.name for path in self.path.glob("*.safetensors")}
        for name in sorted(shards - manifest.files.keys()):
            yield f"{printable_line(name)}: not in {MANIFEST}"
        if not manifest.files:
            yield f"{MANIFEST} names no files"


def list_checkpoints(run_dir: RunDir) -> list[Checkpoint]:
    """Return the checkpoints of a run, the newest first."""
    try:
        entries = list(run_dir.checkpoints.iterdir())
    except OSError:
        return []
    matches = [(entry, _NAME.fullmatch(entry.name)) for entry in entries]
    return sorted(
        (Checkpoint(int(match[1]), entry) for entry, match in matches if match), reverse=True
    )


def find_checkpoint(run_dir: RunDir, name: str) -> Checkpoint:
    """Return the checkpoint called `name`, such as `step-00000120` or `120`.

    Raises:
        CheckpointError: The run has no checkpoint of that name; the message lists those it has.
    """
    checkpoints = list_checkpoints(run_dir)
    step = digits(name.removeprefix("step-"))
    for checkpoint in checkpoints:
        if checkpoint.step == step:
            return checkpoint
    names = ", ".join(checkpoint.name for checkpoint in checkpoints)
    raise CheckpointError(
        f"{run_dir.shown} has no checkpoint {brief(repr(name))}. Its checkpoints: "
        f"{names or 'none'}."
    )


def damage_error(
    checkpoint: Checkpoint, damage: str, earlier: Sequence[Checkpoint]
) -> CheckpointError:
    """Return the error for a damaged checkpoint, which names the one to resume from instead.

    Args:
        checkpoint: The damaged checkpoint.
        damage: How it is damaged.
        earlier: The checkpoints before it, the newest first.
    """
    remedy = "There is no earlier checkpoint."
    if earlier:
        name = earlier[0].name
        remedy = (
            f"The checkpoint before it is {name}: add `--from {name}`, or --auto for the newest "
            "undamaged one."
        )
    return CheckpointError(f"{checkpoint.path} is damaged: {damage}. {remedy}")


def begin_checkpoint(run_dir: RunDir, step: int) -> Path:
    """Create and return an empty folder for the checkpoint of `step`.

    Whatever an earlier attempt left in that folder is deleted.

    Raises:
        OSError: The folder cannot be created, or `checkpoints` is a symbolic link.
    """
    if run_dir.checkpoints.is_symlink():
        raise OSError(errno.ELOOP, "It is a symbolic link, which could lead anywhere")
    folder = run_dir.checkpoints / f".step-{step:08}"
    run_dir.checkpoints.mkdir(mode=0o700, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


def commit_checkpoint(folder: Path, manifest: Manifest) -> Checkpoint:
    """Write the manifest into a folder of `begin_checkpoint`, and give the folder its name.

    The manifest is on the disk before the name changes. A checkpoint that has the name already is
    set aside.

    Args:
        folder: The folder, in which every other file has been written and synchronised.
        manifest: The manifest, which lists these files.

    Raises:
        OSError: The folder cannot be renamed or synchronised.
        RunDirError: checkpoint.json cannot be written.
    """
    save_manifest(folder, manifest)
    _sync(folder)
    target = folder.with_name(folder.name.removeprefix("."))
    if os.path.lexists(target):  # the run was resumed from an earlier checkpoint
        set_aside(Checkpoint(manifest.step, target))
    folder.rename(target)
    _sync(target.parent)
    return Checkpoint(manifest.step, target)


def prune_checkpoints(run_dir: RunDir, keep: int, others: Container[int] = ()) -> None:
    """Remove all checkpoints except the newest `keep`.

    Each is renamed before it is deleted, so that a kill never leaves half of a checkpoint.

    Args:
        run_dir: The run folder.
        keep: The number of newest checkpoints to keep.
        others: The steps of further checkpoints to keep.
    """
    for checkpoint in list_checkpoints(run_dir)[keep:]:
        if checkpoint.step in others:
            continue
        removed = checkpoint.path.with_name(f".{checkpoint.name}.removed")
        checkpoint.path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def set_aside(checkpoint: Checkpoint) -> None:
    """Rename a checkpoint so that it is no longer listed.

    A run does this to the checkpoints saved after the one that it resumes from.
    """
    target = checkpoint.path.with_name(checkpoint.name + _SET_ASIDE)
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.path.rename(target)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
