"""The checkpoints of a run: which are whole, what each says of itself, whether it is still so.

    checkpoints/step-00000120/
        checkpoint.json        where in the run it is, and size and SHA-256 of each other file
        shard-*.safetensors    weights, optimizer state and buffers, the part of one rank each

A folder has its name from the moment at which all of it is on the disk. What is still being written
begins with a dot; what a resumed run has left behind ends in `.set-aside`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import CheckpointError
from launcher.plan import Plan
from launcher.rundir import RunDir, write_json

FORMAT = 1
"""Of checkpoint.json and of the names of tensors."""

_SAME = ("recipe", "batch_size", "stages", "seed", "train_samples")
"""What a resumed run has in common with the one that was, so that its samples go on."""

_FREE = (
    "strategy",
    "micro_batch_size",
    "offload",
    "activation_checkpointing",
    "device",
    "checkpoint_every",
    "keep_checkpoints",
    "hang_timeout",
    "noise_scale",
    "record_samples",
)
"""Settings that change no step."""

_MANIFEST = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = ".set-aside"
_HASHED_AT_ONCE = 1 << 20


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

    values: Mapping[str, Any]
    """State that is no tensor: of the optimizer, of the scaling in fp16; what the data is."""

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
        path = self.path / _MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            files = {name: FileSum(**each) for name, each in values.pop("files").items()}
            manifest = Manifest(**values, files=files)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is damaged"
            raise CheckpointError(f"{self.path}: cannot read {_MANIFEST}: {reason}.") from None
        if manifest.format != FORMAT:
            raise CheckpointError(
                f"{self.path} is of format {manifest.format}, and this version of launcher reads "
                f"format {FORMAT}. Resume it with the version that wrote it: "
                f"{manifest.versions.get('gpu-launcher', 'see checkpoint.json')}."
            )
        return manifest

    def damages(self, files: Iterable[str], manifest: Manifest) -> Iterator[str]:
        """Yield what is wrong with each of `files`, which it reads from beginning to end."""
        for name in files:
            path, known = self.path / name, manifest.files[name]
            try:
                found = sum_file(path)
            except OSError as error:
                yield f"{name}: {error.strerror}"
                continue
            if found.num_bytes != known.num_bytes:
                yield f"{name}: {found.num_bytes:,} bytes instead of {known.num_bytes:,}"
            elif found.sha256 != known.sha256:
                yield f"{name}: not the bytes that were written (SHA-256)"


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


def check_resumable(
    manifest: Manifest, plan: Plan, name: str, accept: Collection[str] = ()
) -> None:
    """Refuse to go on with a plan that takes other samples than the run that was.

    Args:
        manifest: What the checkpoint says of itself.
        plan: How the run would go on.
        name: The checkpoint's, for the message.
        accept: What may differ: with `data` the number of training samples may.

    Raises:
        CheckpointError: It names what differs.
    """
    was, now = manifest.agreement, json.loads(json.dumps(plan.agreement()))
    for key in _SAME:
        if key == "train_samples" and (
            "data" in accept
            or (None in (was.get(key), now.get(key)) and manifest.values.get("data") is not None)
        ):
            continue  # where only one of them is known, the data itself is compared
        if was.get(key) != now.get(key):
            hint = ""
            if key == "batch_size" and now.get("batch_size_per_gpu") is not None:
                hint = " (batch_size_per_gpu lets it follow the ranks)"
            if key == "train_samples":
                hint = " (`--accept data` goes on with other data on purpose)"
            raise CheckpointError(
                f"{name} was written with {key} {was.get(key)}, and the plan has {now.get(key)}"
                f"{hint}: the samples of its steps would be others. Resume it with {key} "
                f"{was.get(key)}, or start a new run."
            )


def changes(manifest: Manifest, plan: Plan) -> list[str]:
    """Return the settings that are others than those of the run that was, in words."""
    was, now = manifest.agreement, json.loads(json.dumps(plan.agreement()))
    return [
        f"{key} {was[key]} -> {now[key]}"
        for key in sorted(was.keys() & now.keys())
        if was[key] != now[key] and key in plan.settings and key not in _FREE
    ]


def sum_file(path: Path) -> FileSum:
    """Return size and SHA-256 of a file."""
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_HASHED_AT_ONCE):
            digest.update(piece)
            num_bytes += len(piece)
    return FileSum(num_bytes=num_bytes, sha256=digest.hexdigest())


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
    write_json(folder / _MANIFEST, asdict(manifest))
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
