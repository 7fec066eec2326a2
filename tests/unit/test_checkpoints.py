"""Checkpoints on the disk: whatever differs from what was written is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import CheckpointError
from launcher.runs.checkpoints import Checkpoint, begin, commit, list_checkpoints
from launcher.runs.manifest import FORMAT, Manifest, sum_file
from launcher.runs.rundir import RunDir

SHARD = "shard-00001-model-00001-of-00001.safetensors"

MANIFEST = Manifest(
    format=FORMAT,
    step=12,
    samples=744,
    world_size=2,
    agreement={"recipe": "digits", "batch_size": 62},
    values={"optimizer": {}, "groups": [{}], "scaler": None},
    versions={"gpu-launcher": "0.1.0"},
)


@pytest.fixture
def written(tmp_path: Path) -> Checkpoint:
    """Write a checkpoint with one shard, and return it."""
    run_dir = RunDir(tmp_path)
    folder = begin(run_dir, MANIFEST.step)
    shard = folder / SHARD
    shard.write_bytes(bytes(1000))
    return commit(folder, replace(MANIFEST, files={shard.name: sum_file(shard)}))


def edit(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of checkpoint.json."""
    path = checkpoint.path / "checkpoint.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2))


def test_a_manifest_is_read_as_it_was_written(written: Checkpoint) -> None:
    """A manifest survives the file unchanged, whatever the whitespace in the file."""
    path = written.path / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    manifest = written.read_manifest()
    assert replace(manifest, files={}) == MANIFEST
    assert not list(written.damages(manifest.files, manifest))
    assert not list(written.unlisted(manifest))


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another step": lambda values: values.update(step=8),
    "another number of samples": lambda values: values.update(samples=1),
    "no digest": lambda values: values.pop("digest"),
    "no values": lambda values: values.update(values={}),
    "no files": lambda values: values.update(files={}),
    "another setting": lambda values: values["agreement"].update(batch_size=31),
    "an unknown format": lambda values: values.update(format=99),
    "no format": lambda values: values.pop("format"),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_an_edited_manifest_is_refused(
    written: Checkpoint, change: Callable[[dict[str, Any]], object]
) -> None:
    """Every edit of checkpoint.json is detected, because the file holds its own digest."""
    edit(written, change)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        written.read_manifest()


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "step is a text": lambda values: values.update(step="x"),
    "step is not that of the folder": lambda values: values.update(step=8),
    "agreement is a list": lambda values: values.update(agreement=[]),
    "values lack the groups": lambda values: values["values"].pop("groups"),
    "values are a list": lambda values: values.update(values=[]),
    "a size is a text": lambda values: values["files"][SHARD].update(num_bytes="x"),
    "versions are missing": lambda values: values.pop("versions"),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_an_older_manifest_is_checked_by_type(
    written: Checkpoint, change: Callable[[dict[str, Any]], object]
) -> None:
    """Format 1 has no digest; its fields are checked by type and against the folder's name."""

    def make_format_1(values: dict[str, Any]) -> None:
        values.pop("digest")
        values.update(format=1)

    edit(written, make_format_1)
    assert written.read_manifest().step == 12
    edit(written, change)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        written.read_manifest()


@pytest.mark.parametrize("content", ["", "[]", "null", '{"format": 1, "step"', "[" * 100_000])
def test_a_manifest_that_is_not_an_object_is_refused(written: Checkpoint, content: str) -> None:
    """A truncated or overwritten checkpoint.json raises a CheckpointError that names the file."""
    (written.path / "checkpoint.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        written.read_manifest()


@pytest.mark.parametrize("name", ["checkpoint.json", SHARD])
def test_a_fifo_is_refused(written: Checkpoint, name: str) -> None:
    """A FIFO in place of a file counts as damage, and reading it does not block."""
    manifest = written.read_manifest()
    (written.path / name).unlink()
    os.mkfifo(written.path / name)
    if name == "checkpoint.json":
        with pytest.raises(CheckpointError, match="Not a regular file"):
            written.read_manifest()
    else:
        assert list(written.damages(manifest.files, manifest)) == [f"{name}: Not a regular file"]


def test_a_shard_that_is_not_listed_is_damage(written: Checkpoint) -> None:
    """A shard without a digest in the manifest is reported by name."""
    (written.path / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"")
    (damage,) = written.unlisted(written.read_manifest())
    assert damage.startswith("shard-00002")


def test_other_folders_are_not_listed(written: Checkpoint) -> None:
    """Unfinished, set-aside and foreign folders are not checkpoints."""
    for name in (".step-00000013", "step-00000014.set-aside", "step-1", "notes"):
        (written.path.parent / name).mkdir()
    assert list_checkpoints(RunDir(written.path.parent.parent)) == [written]
