"""Quick checkpoints: ordinary checkpoints in a folder that each node has to itself.

    DIR/digits-5f3a90c1d2e4/       the run, named after the path of its folder
        9c41f0aa27e3b5d8/          the attempt: a random number that quick.json of the run has
            rank3/step-00000120/
                checkpoint.json        the manifest of the whole checkpoint
                shard-*.safetensors    the part of rank 3, and that of the rank that sends it to it

A part gets its name when its files and those of all other ranks are on the disk. When ranks start,
those of the attempt before are promoted into the run folder, or are of no more use. A new attempt
therefore removes what the node has of the run. A node that was away for some attempts may keep
parts, which no later attempt looks for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from launcher.errors import CheckpointError, RunDirError
from launcher.json_file import read_json
from launcher.regular_file import open_regular, size_of
from launcher.runs.files import remove_file, write_json
from launcher.runs.manifest import (
    MANIFEST,
    FileDigest,
    Manifest,
    encode_manifest,
    load_manifest,
    sum_file,
)
from launcher.runs.rundir import RunDir
from launcher.runs.shard_files import NewFile

_NAME = re.compile(r"\.?step-(\d{8,})")
_BYTES_PER_COPY = 1 << 20


class _Record(msgspec.Struct, frozen=True):
    """The content of quick.json."""

    attempt: str
    """The attempt whose quick checkpoints belong to the run."""


def read_attempt(run_dir: RunDir) -> str | None:
    """Return the attempt whose quick checkpoints belong to a run; None if none do."""
    try:
        attempt = read_json(run_dir.quick, _Record).attempt
    except RunDirError:
        return None
    return attempt if re.fullmatch(r"[0-9a-f]{16}", attempt) else None


def write_attempt(run_dir: RunDir, attempt: str) -> None:
    """Let the quick checkpoints of an attempt belong to a run, and no others.

    Raises:
        RunDirError: quick.json cannot be written.
    """
    write_json(run_dir.quick, {"attempt": attempt})


def forget_attempt(run_dir: RunDir) -> None:
    """Let no quick checkpoint belong to a run.

    Raises:
        RunDirError: quick.json cannot be removed.
    """
    remove_file(run_dir.quick)


def folder_of_run(base: str, run_dir: RunDir) -> Path:
    """Return the folder below `base` for the quick checkpoints of a run."""
    digest = hashlib.sha256(os.fsencode(run_dir.path)).hexdigest()
    return Path(base) / f"{run_dir.path.name[:100]}-{digest[:12]}"


def is_own(folder: Path) -> bool:
    """Return whether a folder is one of this user that no other user can write to.

    In /dev/shm anyone can make a folder of any name.
    """
    try:
        status = folder.lstat()
    except OSError:
        return False
    is_private = not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and is_private


def remove_run(folder: Path) -> None:
    """Remove what this node has of the quick checkpoints of a run, as far as this user may."""
    shutil.rmtree(folder, ignore_errors=True)


def make_private(base: str, folder: Path) -> None:
    """Make a folder, with those above it up to `base`, that no other user can write to.

    Args:
        base: The setting `quick_checkpoints`, a folder that exists or whose parent does.
        folder: The folder, below `base`.

    Raises:
        OSError: It cannot be made or written, or another user can write to it.
    """
    Path(base).mkdir(exist_ok=True)
    between = folder.relative_to(base).parts
    for number in range(1, len(between) + 1):
        path = Path(base, *between[:number])
        path.mkdir(mode=0o700, exist_ok=True)
        if not is_own(path):
            raise OSError(f"another user can write to {path}")
    probe = folder / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def part_name(step: int) -> str:
    """Return the name of the folder of a part."""
    return f"step-{step:08}"


def commit_part(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the folder of a part, whose name begins with a dot, and rename it.

    Nothing waits for the disk: after a power failure, the digest in the manifest tells whether it
    is whole.

    Raises:
        OSError: The manifest cannot be written, or the folder cannot be renamed.
    """
    (folder / MANIFEST).write_text(encode_manifest(manifest))
    folder.rename(folder.with_name(folder.name.removeprefix(".")))


def remove_parts(folder: Path, before: int) -> None:
    """Remove the parts in the folder of a rank that were saved before a step, complete or not."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) < before:
                with contextlib.suppress(OSError):  # a kill leaves no half of a complete part
                    hidden = path.with_name(f".{path.name.removeprefix('.')}")
                    path.rename(hidden)
                    shutil.rmtree(hidden, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class HeldStep:
    """What one node has of a quick checkpoint."""

    manifest: Manifest
    folders: Mapping[str, Path]
    """The folder in which each file lies that is present with its size, by the file's name."""


def held_steps(folder: Path, after: int) -> dict[tuple[int, str], HeldStep]:
    """Return what a node has of the quick checkpoints of an attempt that are newer than a step.

    The bytes are not read. Parts of other users, and parts whose manifest is damaged, do not count.

    Args:
        folder: The folder of the attempt.
        after: The step.

    Returns:
        What it has of each, by step and SHA-256 of checkpoint.json.
    """
    found: dict[tuple[int, str], HeldStep] = {}
    if not (is_own(folder.parent) and is_own(folder)):
        return found
    for path, step in _parts(folder):
        if step <= after:
            continue
        try:
            content = sum_file(path / MANIFEST).sha256
            manifest = load_manifest(path)
        except (OSError, CheckpointError):
            continue
        before = found.get((step, content))
        folders = {} if before is None else dict(before.folders)
        if manifest.step == step:
            folders |= dict.fromkeys(_whole_files(path, manifest), path)
            found[step, content] = HeldStep(manifest=manifest, folders=folders)
    return found


def _parts(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the complete parts of all ranks, and their steps."""
    for path in sorted(folder.glob("rank*/step-*")):
        match = _NAME.fullmatch(path.name)
        if match and is_own(path):
            yield path, int(match[1])


def _whole_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name, expected in manifest.files.items():
        with contextlib.suppress(OSError):
            if Path(name).name == name and size_of(folder / name) == expected.num_bytes:
                yield name


def copy_verified(source: Path, folder: Path, expected: FileDigest) -> str | None:
    """Copy a file to the folder of a checkpoint, and wait until it is on the disk.

    Returns:
        How the file is damaged, or why it cannot be copied; None if the copy is good.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with open_regular(source) as file, NewFile(descriptor, source.name) as copy:
                while block := file.read(_BYTES_PER_COPY):
                    copy.write(block)
                found = copy.finish()
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"{source.name}: {error.strerror or error}"
    if found != {"num_bytes": expected.num_bytes, "sha256": expected.sha256}:
        return f"{source.name}: not the bytes that were written (SHA-256)"
    return None
