"""Tests that a checkpoint holds all state, or the run is refused after one step at the latest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from support import ROOT, Commands, read_lines, read_weights

from launcher.runs.manifest import sum_file

STATEFUL = f"{ROOT / 'tests/recipes/stateful.py'}:stateful"

WORLDS = f"{ROOT / 'tests/recipes/worlds.py'}:worlds"


def test_every_kind_of_state_is_resumed(run: Commands) -> None:
    """A run resumed after 4 and 5 of 6 steps is bitwise equal to an uninterrupted run."""
    for folder, steps in (("whole", 6), ("halves", 4)):
        done = run("launcher", "run", STATEFUL, "-n", "2", "-q", f"steps={steps}", "--out", folder)
        assert done.exit_code == 0, done.stderr
    for steps in (5, 6):
        done = run("launcher", "resume", "halves", "-q", f"steps={steps}")
        assert done.exit_code == 0, done.stderr
    whole, halves = read_weights(run.folder / "whole"), read_weights(run.folder / "halves")
    assert whole.keys() == halves.keys()
    assert {"scale", "seen", "near", "far", "wide", "weight"} <= whole.keys()
    for name, value in whole.items():
        assert torch.equal(value, halves[name]), name
    losses = [
        [row["loss"] for row in read_lines(run.folder / folder / "metrics.jsonl") if "loss" in row]
        for folder in ("whole", "halves")
    ]
    assert losses[0][:6] == losses[1][:6]


@pytest.mark.parametrize(
    ("settings", "exit_code", "named"),
    [
        (["optimizer=text"], 1, "'ema'"),
        (["model=unwritable", "optimizer=sgd"], 1, "get_extra_state"),
        (["model=sparse", "optimizer=sgd"], 2, "mask"),
    ],
)
def test_state_that_a_checkpoint_cannot_hold_is_refused(
    run: Commands, settings: list[str], exit_code: int, named: str
) -> None:
    """The error names the state after at most one step; exit code 2 means before the first step."""
    done = run("launcher", "run", STATEFUL, "-n", "1", "-q", "--out", "out", *settings)
    assert done.exit_code == exit_code, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    metrics = run.folder / "out/metrics.jsonl"
    assert len(read_lines(metrics) if metrics.exists() else []) <= 1


def strip_optimizer(checkpoint: Path) -> None:
    """Turn a checkpoint into one of format 1 that lost its optimizer state."""
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            metadata = file.metadata()
            names = [name for name in file.keys() if not name.startswith("optimizer/")]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
        safetensors.torch.save_file(tensors, shard, metadata)
    path = checkpoint / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    for name, entry in manifest["files"].items():
        actual = sum_file(checkpoint / name)
        entry.update(num_bytes=actual.num_bytes, sha256=actual.sha256)
    path.write_text(json.dumps(manifest | {"format": 1}))


def test_lost_optimizer_state_of_an_earlier_version_is_detected(run: Commands) -> None:
    """A checkpoint that lost its optimizer state is refused without --accept missing-state."""
    arguments = ("-n", "2", "-q", "strategy=fsdp", "epochs=1", "num_workers=0", "--out", "out")
    done = run("launcher", "run", WORLDS, *arguments)
    assert done.exit_code == 0, done.stderr
    (checkpoint,) = (run.folder / "out/checkpoints").glob("step-*")
    strip_optimizer(checkpoint)
    done = run("launcher", "resume", "out", "epochs=2")
    assert done.exit_code == 2, done.stdout
    assert "lacks the optimizer state of" in done.stderr
    assert "--accept missing-state" in done.stderr
    done = run("launcher", "resume", "out", "epochs=2", "--accept", "missing-state")
    assert done.exit_code == 0, done.stderr
    assert "lacks the optimizer state of" in done.stdout
