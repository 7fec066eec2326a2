"""Initial weights that are drawn shard by shard, kept in turns, or read from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, Commands

WAYS = ("recorded", "in_turns", "read")
OTHERS = {
    "ddp-read": "ddp-read",
    "fsdp-recorded-precision=fp64": "ddp-recorded-precision=fp64",
    "fsdp-recorded-offload=cpu-activation_checkpointing=True": "ddp-recorded",
    "zero3-recorded-offload=cpu": "ddp-recorded",
}
CASES = {f"{strategy}-{way}": f"ddp-{way}" for strategy in ("fsdp", "zero3") for way in WAYS}
CASES |= OTHERS
"""The case on one rank that each case on two ranks must repeat."""


@pytest.fixture(scope="module")
def built(module_run: Commands) -> tuple[Path, str]:
    """Build and train the cases on one rank and on two; return their folder and their output."""
    output = ""
    for ranks in (1, 2):
        done = module_run("python", ROOT / "tests/initial_weights.py", str(ranks))
        assert done.exit_code == 0, done.stdout + done.stderr
        output = done.stdout
    return module_run.folder, output


@pytest.mark.parametrize("case", sorted(CASES))
def test_two_ranks_start_with_the_weights_of_one(built: tuple[Path, str], case: str) -> None:
    """Initial weights and buffers are equal to the bit, and those after four steps to 1e-5."""
    folder, _ = built
    expected, found = folder / "1" / CASES[case], folder / "2" / case
    first, own = load_file(expected / "initial"), load_file(found / "initial")
    assert own.keys() == first.keys()
    for name, tensor in first.items():
        assert torch.equal(own[name], tensor), name
    trained, own = load_file(expected / "final"), load_file(found / "final")
    for name, tensor in trained.items():
        torch.testing.assert_close(own[name], tensor, rtol=0, atol=1e-5)
    moved = [name for name in trained if not torch.equal(trained[name], first[name])]
    assert len(moved) >= 10, "the steps changed the weights"


def test_the_ways_differ_where_they_should(built: tuple[Path, str]) -> None:
    """Weights that are read differ from those that are drawn, and two models are built in turns."""
    folder, output = built
    drawn = load_file(folder / "1" / "ddp-recorded" / "initial")
    read = load_file(folder / "1" / "ddp-read" / "initial")
    assert all(not torch.equal(read[name], drawn[name]) for name in drawn if name != "shift")
    assert output.count("cannot be recorded") == 2
