"""Optimizers that look at whole weights, and dtypes, where weights are split over ranks."""

from __future__ import annotations

import json

import pytest
from support import ROOT, Commands

CLIPPED = f"{ROOT / 'tests/recipes/clipped.py'}:clipped"
MIXED = f"{ROOT / 'tests/recipes/mixed.py'}:mixed"
SCALING = f"{ROOT / 'tests/recipes/scaling.py'}:scaling"


def test_an_optimizer_by_norms_takes_the_same_steps_under_fsdp(run: Commands) -> None:
    """Norms that are tensors are those of whole weights, and steps those of one process."""
    done = run(
        *("launcher", "prove", SCALING, "--worlds", "1,2", "--strategies", "ddp,fsdp", "--json"),
        *("--steps", "4", "device=cpu"),
    )
    assert done.exit_code == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)


def test_an_optimizer_that_reads_the_norm_of_a_part_is_refused(run: Commands) -> None:
    """An optimizer that takes a number from its rank's part is refused before the first step."""
    done = run(
        *("launcher", "run", SCALING, "-n", "2", "-q", "--out", "out", "device=cpu"),
        *("strategy=fsdp", "reads_numbers=true"),
    )
    assert done.exit_code == 2, done.stderr
    assert "LayerWise" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run.folder / "out/checkpoints").exists()


@pytest.mark.parametrize(("kind", "named"), [("weights", "float64"), ("inputs", "precision=bf16")])
def test_dtypes_that_fsdp_does_not_mix_are_refused(run: Commands, kind: str, named: str) -> None:
    """Trained weights of two dtypes, and a norm of an fp32 input in bf16 on CPUs, are refused."""
    done = run(
        *("launcher", "run", MIXED, "-n", "2", "-q", "--out", "out", "device=cpu"),
        *("strategy=fsdp", f"kind={kind}"),
    )
    assert done.exit_code == 2, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_callback_writes_in_vain_is_refused(run: Commands) -> None:
    """Weights that a callback writes, while ZeRO-3 trains on from others, end the run."""
    done = run(
        *("launcher", "run", CLIPPED, "-n", "2", "-q", "--out", "out", "device=cpu"),
        *("strategy=zero3", "epochs=none", "steps=4"),
    )
    assert done.exit_code == 1, done.stderr
    assert "The callback Clip" in done.stderr
    assert "Traceback" not in done.stderr
