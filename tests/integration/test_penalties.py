"""Penalties on gradients and weights, where a strategy frees the weights between modules."""

from __future__ import annotations

import json

import pytest
from support import ROOT, Commands

PENALIZED = f"{ROOT / 'tests/recipes/penalized.py'}:penalized"


@pytest.mark.parametrize("penalty", ["gradient", "sensitivity"])
def test_a_penalty_on_gradients_takes_the_same_steps(run: Commands, penalty: str) -> None:
    """Steps are those of one process wherever the weights stay from forward to backward."""
    strategies = "ddp,zero2" if penalty == "gradient" else "ddp,fsdp"
    done = run(
        *("launcher", "prove", PENALIZED, "--worlds", "1,2", "--strategies", strategies, "--json"),
        *("--steps", "3", "device=cpu", f"penalty={penalty}"),
    )
    assert done.exit_code == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)


@pytest.mark.parametrize(
    ("strategy", "penalty"),
    [("fsdp", "gradient"), ("zero3", "gradient"), ("zero3", "sensitivity"), ("fsdp", "weights")],
)
def test_a_penalty_with_freed_weights_is_refused(
    run: Commands, strategy: str, penalty: str
) -> None:
    """A run that would compute with freed or partial weights is refused before its first step."""
    done = run(
        *("launcher", "run", PENALIZED, "-n", "2", "-q", "--out", "out", "device=cpu"),
        *(f"strategy={strategy}", f"penalty={penalty}"),
    )
    assert done.exit_code == 2, done.stderr
    assert f"strategy={strategy}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run.folder / "out/checkpoints").exists()
