"""Checkpoints under ZeRO: each rank saves the parts that it has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, Commands, read_lines, read_weights

from launcher.engine.saving.checkpoint_tensors import StoredState
from launcher.runs.checkpoints import Checkpoint
from launcher.runs.manifest import FORMAT, Manifest

STRATEGIES = ("zero1", "zero2", "zero3")
RANKS = 3
PARTLY_FROZEN = f"{ROOT / 'tests/recipes/partly_frozen.py'}:partly_frozen"


@pytest.fixture(scope="module")
def saved(module_run: Commands) -> Path:
    """Train under each strategy on three ranks, and save the parts of each."""
    done = module_run("python", ROOT / "tests/zero_shards.py", str(RANKS), *STRATEGIES)
    assert done.exit_code == 0, done.stdout + done.stderr
    return module_run.folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_parts_are_the_tensors(saved: Path, strategy: str) -> None:
    """The parts of three ranks are, to the bit, the weights and averages that DeepSpeed gathers."""
    folder = saved / strategy
    manifest = Manifest(
        format=FORMAT,
        step=3,
        samples=1,
        world_size=RANKS,
        agreement={},
        values={"optimizer": {}, "groups": [], "scaler": None},
        versions={},
    )
    stored = StoredState(Checkpoint(step=3, path=folder), manifest)
    expected = load_file(folder / "expected")
    assert {name for name in stored.names() if not name.endswith("/step")} == expected.keys()
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    stored.read(found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_tensor_is_exchanged_while_training_waits(saved: Path, strategy: str) -> None:
    """A snapshot gathers no weights and no optimizer state."""
    assert json.loads((saved / strategy / "collectives.json").read_text()) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_buckets_are_as_large_as_the_gradients(saved: Path, strategy: str) -> None:
    """DeepSpeed allocates room for the gradients of the trained weights, and for no more."""
    expected = load_file(saved / strategy / "expected")
    trained = [name.split("/")[1] for name in expected if name.endswith("/exp_avg")]
    num_trained = sum(expected[f"model/{name}"].numel() for name in trained)
    assert json.loads((saved / strategy / "bucket.json").read_text()) == num_trained


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_rank_saves_its_share(saved: Path, strategy: str) -> None:
    """Each rank writes about a third of the weights that are trained and of their averages."""
    folder, frozen = saved / strategy, ("model/1.weight", "model/1.bias")
    expected = load_file(folder / "expected")
    total = sum(tensor.nbytes for name, tensor in expected.items() if name not in frozen)
    for rank in range(RANKS):
        parts = [load_file(path) for path in folder.glob(f"shard-{rank + 1:05}-*")]
        written = [(name, tensor) for part in parts for name, tensor in part.items()]
        num_bytes = sum(tensor.nbytes for name, tensor in written if name not in frozen)
        assert num_bytes == pytest.approx(total / RANKS, rel=0.1)


def test_three_ranks_of_zero3_go_on_as_two_of_ddp(run: Commands) -> None:
    """A run under zero3 on three ranks that goes on under ddp on two takes the same steps."""
    arguments = ("-q", "checkpoint_every=3", "evaluate_every=5")
    for folder, ranks, strategy in (("whole", "2", "ddp"), ("parts", "3", "zero3")):
        options = ("-n", ranks, f"strategy={strategy}", "--out", folder)
        done = run("launcher", "run", PARTLY_FROZEN, *arguments, *options)
        assert done.exit_code == 0, done.stderr
    done = run(
        *("launcher", "resume", "parts", "--from", "step-00000003", "-n", "2", "strategy=ddp", "-q")
    )
    assert done.exit_code == 0, done.stderr
    whole, parts = read_weights(run.folder / "whole"), read_weights(run.folder / "parts")
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.allclose(value, parts[name], atol=1e-5), name
    steps = [
        [row["loss"] for row in read_lines(run.folder / folder / "metrics.jsonl") if "loss" in row]
        for folder in ("whole", "parts")
    ]
    assert steps[0] == pytest.approx(steps[1], rel=1e-4)
