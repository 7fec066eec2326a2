"""Checkpoints on the disk: whatever differs from what was written is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from damaged_run import WHOLE_FILE
from examples import NODE, recipe

from launcher import Plan, make_plan
from launcher.errors import CheckpointError
from launcher.runs.checkpoints import (
    Checkpoint,
    begin_checkpoint,
    commit_checkpoint,
    list_checkpoints,
)
from launcher.runs.manifest import FORMAT, Manifest, save_manifest, sum_file
from launcher.runs.resumption import check_resumable, setting_changes
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
    folder = begin_checkpoint(run_dir, MANIFEST.step)
    shard = folder / SHARD
    shard.write_bytes(bytes(1000))
    return commit_checkpoint(folder, replace(MANIFEST, files={shard.name: sum_file(shard)}))


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
    assert not list(written.find_damage(manifest.files, manifest))
    assert not list(written.find_unlisted(manifest))


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


def make_format_1(values: dict[str, Any]) -> None:
    """Turn the content of checkpoint.json into that of an earlier version, without a digest."""
    values.pop("digest")
    values.update(format=1)


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_an_older_manifest_is_checked_by_type(
    written: Checkpoint, change: Callable[[dict[str, Any]], object]
) -> None:
    """Format 1 has no digest; its fields are checked by type and against the folder's name."""
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
        (damage,) = written.find_damage(manifest.files, manifest)
        assert damage.startswith(f"{name}: Not a regular file")


@pytest.mark.parametrize("damage", WHOLE_FILE.values(), ids=WHOLE_FILE)
def test_what_is_not_the_shard_is_damage(
    written: Checkpoint, damage: Callable[[Path], object]
) -> None:
    """Whatever stands in place of a shard is one message with its name, found at once."""
    manifest = written.read_manifest()
    damage(written.path / SHARD)
    (message,) = written.find_damage(manifest.files, manifest)
    assert message.startswith(f"{SHARD}: ")


@pytest.mark.parametrize("name", ["/dev/zero", "../other", "a/b", "a\0b", "\x1b" * 300, ".", ""])
def test_files_outside_the_folder_are_not_read(written: Checkpoint, name: str) -> None:
    """A manifest that lists something else than files of its folder is damage."""
    manifest = written.read_manifest()
    manifest = replace(manifest, files={name: manifest.files[SHARD]})
    (damage,) = written.find_damage(manifest.files, manifest)
    assert len(damage) < 1000
    assert "\x1b" not in damage


@pytest.mark.parametrize("value", [None, -5, [], "", "\ud800", 1e300])
@pytest.mark.parametrize("name", ["digest", "files", "step", "values", "world_size"])
def test_values_of_other_types_are_refused(written: Checkpoint, name: str, value: Any) -> None:
    """A manifest with a value of another type, its own digest included, is damage."""
    if name != "digest":  # which would not fit a changed value
        edit(written, make_format_1)
    edit(written, lambda values: values.update({name: value}))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        written.read_manifest()


def test_a_manifest_without_files_vouches_for_nothing(written: Checkpoint) -> None:
    """A manifest that lists no files, with a digest that fits, is damage of its shards."""
    save_manifest(written.path, replace(MANIFEST, files={}))
    manifest = written.read_manifest()
    damages = list(written.find_unlisted(manifest))
    assert len(damages) == 2
    assert damages[0].startswith(SHARD)


def test_nothing_is_saved_through_a_link(written: Checkpoint) -> None:
    """A folder `checkpoints` that is a link is not written to, nor is one of its folders."""
    run_dir = RunDir(written.path.parent.parent)
    elsewhere = run_dir.path / "elsewhere"
    run_dir.checkpoints.rename(elsewhere)
    run_dir.checkpoints.symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [12]
    with pytest.raises(OSError, match="symbolic link"):
        begin_checkpoint(run_dir, 24)
    run_dir.checkpoints.unlink()
    run_dir.checkpoints.mkdir()
    (run_dir.checkpoints / ".step-00000024").symlink_to(elsewhere)
    with pytest.raises(FileExistsError):
        begin_checkpoint(run_dir, 24)
    assert sorted(elsewhere.rglob("*")) == before


def test_a_shard_that_is_not_listed_is_damage(written: Checkpoint) -> None:
    """A shard without a digest in the manifest is reported by name."""
    (written.path / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"")
    (damage,) = written.find_unlisted(written.read_manifest())
    assert damage.startswith("shard-00002")


def test_other_folders_are_not_listed(written: Checkpoint) -> None:
    """Unfinished, set-aside and foreign folders are not checkpoints."""
    for name in (".step-00000013", "step-00000014.set-aside", "step-1", "notes"):
        (written.path.parent / name).mkdir()
    assert list_checkpoints(RunDir(written.path.parent.parent)) == [written]


def manifest_of(plan: Plan) -> Manifest:
    """Return the manifest of a checkpoint that a run of `plan` wrote, as it is read back."""
    agreement = json.loads(json.dumps(plan.agreement()))
    return replace(MANIFEST, world_size=plan.world_size, agreement=agreement)


RESUMED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "what a step does to the weights": (
        {"lr": 0.2, "max_grad_norm": 1.0, "tf32": True},
        ["lr 0.1 -> 0.2", "max_grad_norm None -> 1.0", "tf32 False -> True"],
    ),
    "how steps are computed": ({"strategy": "zero1", "micro_batch_size": 8, "compile": True}, []),
    "how a node reads samples": ({"in_memory": True, "num_workers": 1}, []),
    "nothing about the training": (
        {"trackers": ("wandb",), "evaluate_every": 9, "max_bad_steps": 1, "checkpoint_every": 5},
        [],
    ),
}


@pytest.mark.parametrize(("overrides", "reported"), RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_reports_what_changes_its_steps(
    overrides: dict[str, Any], reported: list[str]
) -> None:
    """Another setting is allowed, and is reported only where it changes the steps."""
    machine = replace(NODE, has_compiler=True)
    manifest = manifest_of(make_plan(recipe(), machine, nproc_per_node=2))
    plan = make_plan(recipe(**overrides), machine, nproc_per_node=2)
    check_resumable(manifest, plan, "step-00000012")
    assert setting_changes(manifest, plan) == reported


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"batch_size": 128}, "batch_size 256"),
        ({"batch_milestones": (0.5,)}, "stages"),
        ({"train_samples": 1000}, "train_samples 1437"),
        ({"seed": 1}, "seed 0"),
    ],
)
def test_a_resumed_run_keeps_its_samples(overrides: dict[str, Any], named: str) -> None:
    """A setting that would give the steps other samples is refused by name."""
    manifest = manifest_of(make_plan(recipe(), NODE, nproc_per_node=2))
    with pytest.raises(CheckpointError) as caught:
        check_resumable(
            manifest, make_plan(recipe(**overrides), NODE, nproc_per_node=2), "step-00000012"
        )
    assert named in str(caught.value)


def test_a_batch_per_gpu_may_be_stated_as_a_batch() -> None:
    """A run with 32 samples per GPU on 2 GPUs resumes on 4 with 64 in all, and not with 128."""
    per_gpu = recipe(batch_size=None, batch_size_per_gpu=32)
    manifest = manifest_of(make_plan(per_gpu, NODE, nproc_per_node=2))
    check_resumable(
        manifest, make_plan(recipe(batch_size=64), NODE, nproc_per_node=4), "step-00000012"
    )
    with pytest.raises(CheckpointError):
        check_resumable(manifest, make_plan(per_gpu, NODE, nproc_per_node=4), "step-00000012")
