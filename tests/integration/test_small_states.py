"""Optimizers with small states on 1 to 3 ranks, and of whole matrices on 1 to 4, with FSDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matrix import ROUNDED, SMALL, SMALL_WORLDS, WHOLE
from support import Commands, read_weights, train_suite

from launcher.engine.probes.parity import checkpoint_digest, compare, read_trace
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train every case, and resume some from a checkpoint of another number of ranks."""
    return train_suite(module_run, "small", SMALL_WORLDS)


def digest(folder: Path) -> str:
    """Return the digest of weights and optimizer state after the last step."""
    return checkpoint_digest(list_checkpoints(RunDir(folder))[0])


@pytest.mark.parametrize("name", SMALL)
def test_bits_do_not_depend_on_the_ranks(trained: Path, name: str) -> None:
    """With exact sums, weights and states have the bits of one process, also after a resume."""
    alone = trained / "on1" / f"exact-{name}-ddp"
    final = read_weights(alone)
    assert len(list(trained.glob(f"on*/exact-{name}-*"))) >= (6 if name in WHOLE else 4)
    for folder in trained.glob(f"on*/exact-{name}-*"):
        assert digest(folder) == digest(alone), folder
        weights = read_weights(folder)
        assert weights.keys() == final.keys()
        assert all(torch.equal(weights[name], final[name]) for name in final), folder


@pytest.mark.parametrize("name", ROUNDED)
def test_the_ranks_change_nothing_but_rounding(trained: Path, name: str) -> None:
    """With sums in any order, losses on 3 ranks are those of one: to 1e-5, in bf16 to 1e-3."""
    reference = read_trace(RunDir(trained / "on1" / f"rounded-{name}-ddp"))
    (folder,) = (trained / "on3").glob(f"rounded-{name}-*")
    tolerance = 1e-3 if SMALL[name].get("precision") == "bf16" else 1e-5
    difference = compare(reference, read_trace(RunDir(folder)), tolerance)
    assert not difference.unequal
    assert difference.loss < tolerance
    assert difference.grad_norm < 10 * tolerance
