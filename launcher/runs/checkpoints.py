"""The checkpoints of a run: which are whole, what each says of itself, whether it is still so.

    checkpoints/step-00000120/
        checkpoint.json        where in the run it is, size and SHA-256 of each other file, and a
                               SHA-256 of what it says itself
        shard-*.safetensors    weights, optimizer state and buffers, the part of one rank each

A folder has its name from the moment at which all of it is on the disk. What is still being written
begins with a dot; what a resumed run has left behind ends in `.set-aside`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from launcher.errors import CheckpointError
from launcher.runs.rundir import RunDir, write_json

FORMAT = 2
"""The format of checkpoint.json and of the names of tensors that this version writes."""

_FORMATS = (1, FORMAT)
"""The formats that this version reads. Format 1 has no digest of checkpoint.json itself."""

_MANIFEST = "checkpoint.json"
_DIGEST = "digest"
_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = ".set-aside"
_HASHED_AT_ONCE = 1 << 20


class ScalerState(TypedDict):
    """The state of the loss scaling in fp16."""

    scale: float
    good_steps: int


class _AllValues(TypedDict):
    """The state that every version saves."""

    optimizer: dict[str, Any]
    """Plain values that the optimizer keeps, by `optimizer/<parameter>/<key>`."""

    groups: list[dict[str, Any]]
    """Values that the optimizer has changed in its parameter groups."""

    scaler: ScalerState | None
    """None unless the run trains in fp16."""


class Values(_AllValues, total=False):
    """The state in a checkpoint that is not made of tensors.

    Checkpoints of earlier versions lack what is declared here.
    """

    data: dict[str, Any] | None
    """What the data was: lengths, classes and a few samples, as `engine.identity` compares them."""

    extra: dict[str, Any]
    """What `get_extra_state` of modules returned: `extra/<module>`, or `extra/<module>@<rank>`."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What checkpoint.json holds: everything but the tensors."""

    format: int
    step: int
    """Optimizer steps taken."""

    samples: int
    """Training samples consumed."""

    world_size: int
    """Ranks that wrote it."""

    agreement: Mapping[str, Any]
    """The plan's numbers and settings that make its steps what they are."""

    values: Values
    """The state that is not made of tensors."""

    versions: Mapping[str, str]
    files: Mapping[str, FileSum] = field(default_factory=dict)
    """The other files, by name."""


@dataclass(frozen=True, kw_only=True)
class FileSum:
    """What is known of a file, to notice that it has changed."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A checkpoint on the disk, whole when it was given its name."""

    step: int
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def read_manifest(self) -> Manifest:
        """Return what it says of itself.

        Raises:
            CheckpointError: checkpoint.json is missing, damaged or of another format.
        """
        said = self._read_json()
        digest = said.pop(_DIGEST, None)
        form = said.get("format")
        if form not in _FORMATS:
            versions = said.get("versions")
            wrote = versions.get("gpu-launcher") if isinstance(versions, dict) else None
            raise CheckpointError(
                f"{_MANIFEST}: format {form!r}, and this version of launcher reads formats "
                f"{' and '.join(map(str, _FORMATS))}; version {wrote or 'unknown'} wrote it"
            )
        if form != 1 and digest != _digest(said):
            raise CheckpointError(f"{_MANIFEST}: its content does not match its own SHA-256")
        try:
            manifest = msgspec.convert(said, Manifest)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{_MANIFEST}: {error}") from None
        if manifest.step != self.step:
            raise CheckpointError(
                f"{_MANIFEST}: it says that it was saved after step {manifest.step}"
            )
        return manifest

    def _read_json(self) -> dict[str, Any]:
        """Return the content of checkpoint.json, unchecked.

        Raises:
            CheckpointError: The file is missing, or does not hold a JSON object.
        """
        try:
            with _open_regular(self.path / _MANIFEST) as file:
                said = json.loads(file.read())
        except OSError as error:
            raise CheckpointError(f"{_MANIFEST}: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise CheckpointError(f"{_MANIFEST}: not JSON") from None
        if not isinstance(said, dict):
            raise CheckpointError(f"{_MANIFEST}: not a JSON object")
        return said

    def damages(self, files: Iterable[str], manifest: Manifest) -> Iterator[str]:
        """Yield what is wrong with each of `files`, which are read from beginning to end."""
        for name in files:
            path, known = self.path / name, manifest.files[name]
            try:
                found = sum_file(path)
            except OSError as error:
                yield f"{name}: {error.strerror or error}"
                continue
            if found.num_bytes != known.num_bytes:
                yield f"{name}: {found.num_bytes:,} bytes instead of {known.num_bytes:,}"
            elif found.sha256 != known.sha256:
                yield f"{name}: not the bytes that were written (SHA-256)"

    def unlisted(self, manifest: Manifest) -> Iterator[str]:
        """Yield what is wrong with the folder: shards that would be read and never checked."""
        there = {path.name for path in self.path.glob("*.safetensors")}
        for name in sorted(there - manifest.files.keys()):
            yield f"{name}: not in {_MANIFEST}"
        if not manifest.files:
            yield f"{_MANIFEST} names no files"


def list_checkpoints(run_dir: RunDir) -> list[Checkpoint]:
    """Return the run's checkpoints, the newest first."""
    try:
        entries = list(run_dir.checkpoints.iterdir())
    except OSError:
        return []
    matched = [(entry, _NAME.fullmatch(entry.name)) for entry in entries]
    return sorted(
        (Checkpoint(int(found[1]), entry) for entry, found in matched if found), reverse=True
    )


def find_checkpoint(run_dir: RunDir, name: str) -> Checkpoint:
    """Return the checkpoint called `name`: `step-00000120`, or `120`.

    Raises:
        CheckpointError: There is none of that name.
    """
    found = list_checkpoints(run_dir)
    digits = name.removeprefix("step-")
    for checkpoint in found:
        if digits.isdigit() and checkpoint.step == int(digits):
            return checkpoint
    names = ", ".join(checkpoint.name for checkpoint in found)
    raise CheckpointError(
        f"{run_dir.shown} has no checkpoint {name!r}: it has {names or 'none at all'}."
    )


def damage_error(
    checkpoint: Checkpoint, damage: str, earlier: Sequence[Checkpoint]
) -> CheckpointError:
    """Return the error that says what is wrong with a checkpoint and what to resume from instead.

    Args:
        checkpoint: The damaged one.
        damage: What is wrong with it.
        earlier: The checkpoints before it, the newest first.
    """
    other = "There is no earlier one."
    if earlier:
        name = earlier[0].name
        other = (
            f"The one before it is {name}: add `--from {name}`, or --auto to take the newest that "
            "is not damaged."
        )
    return CheckpointError(f"{checkpoint.path} is damaged: {damage}. {other}")


def sum_file(path: Path) -> FileSum:
    """Return the size and the SHA-256 of a file.

    Raises:
        OSError: It cannot be read, or is not a regular file.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with _open_regular(path) as file:
        while piece := file.read(_HASHED_AT_ONCE):
            digest.update(piece)
            num_bytes += len(piece)
    return FileSum(num_bytes=num_bytes, sha256=digest.hexdigest())


def _open_regular(path: Path) -> io.FileIO:
    """Open a file for reading, without waiting at a FIFO or reading from a device.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    file = open(path, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file")
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _digest(said: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content of checkpoint.json, whatever its layout as text."""
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def begin(run_dir: RunDir, step: int) -> Path:
    """Return the folder to write the checkpoint of `step` into, made anew and empty.

    Raises:
        OSError: It cannot be made.
    """
    folder = run_dir.checkpoints / f".step-{step:08}"
    run_dir.checkpoints.mkdir(mode=0o700, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


def commit(folder: Path, manifest: Manifest) -> Checkpoint:
    """Make the folder that `begin` returned a checkpoint: on the disk as a whole, then named.

    Raises:
        OSError: It cannot be written.
        RunDirError: Likewise.
    """
    said = json.loads(json.dumps(asdict(manifest)))  # as it will be read
    write_json(folder / _MANIFEST, said | {_DIGEST: _digest(said)})
    _sync(folder)
    target = folder.with_name(folder.name.removeprefix("."))
    if target.exists():  # of a run that was resumed from an earlier one
        set_aside(Checkpoint(manifest.step, target))
    folder.rename(target)
    _sync(target.parent)
    return Checkpoint(manifest.step, target)


def prune(run_dir: RunDir, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`, each whole or not at all."""
    for checkpoint in list_checkpoints(run_dir)[keep:]:
        gone = checkpoint.path.with_name(f".{checkpoint.name}.removed")
        checkpoint.path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def set_aside(checkpoint: Checkpoint) -> None:
    """Rename a checkpoint that a resumed run has left behind, so that it counts no more."""
    aside = checkpoint.path.with_name(checkpoint.name + _ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.path.rename(aside)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
