"""Runs whose learning rate follows evaluations or a class of torch, resumed on other ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support import ROOT, Commands, read_lines
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

GRIDDED = f"{ROOT / 'tests/recipes/gridded.py'}:gridded"
FOLLOWING = (
    "schedule=plateau('error:min', patience=0, factor=0.5, threshold=0.12)",
    "checkpoint_every=3",
    "keep_checkpoints=20",
)


def lrs_of(run_dir: Path) -> list[float]:
    """Return the learning rate of each step."""
    return [row["lr"] for row in read_lines(run_dir / "metrics.jsonl") if "lr" in row]


def expected_lrs(run_dir: Path) -> list[float]:
    """Return what a plain loop sets with the evaluations that a run recorded."""
    rows = read_lines(run_dir / "metrics.jsonl")
    errors = {row["step"]: row["evaluation"]["error"] for row in rows if "evaluation" in row}
    optimizer = SGD([torch.zeros(1)], lr=0.05)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.12)
    lrs = []
    for step in range(1, 19):
        lrs.append(optimizer.param_groups[0]["lr"])
        if step in errors:
            scheduler.step(errors[step])
    return lrs


def test_a_plateau_is_exact_after_a_resumption_on_other_ranks(run: Commands) -> None:
    """The learning rate is that of torch's class on 2 ranks, and resumed on 1 and 3 ranks.

    The first checkpoint is saved before the evaluation of its step, the others after it.
    """
    whole = run.folder / "whole"
    done = run("launcher", "run", GRIDDED, "-n", "2", *FOLLOWING, "--out", whole, "-q")
    assert done.exit_code == 0, done.stderr
    lrs = lrs_of(whole)
    assert lrs == pytest.approx(expected_lrs(whole), rel=1e-15)
    assert 3 <= len(set(lrs)) <= 8
    for step, *arguments in (("2", "-n", "1"), ("9", "-n", "3", "strategy=fsdp")):
        resumed = run.folder / f"from{step}"
        shutil.copytree(whole, resumed)
        again = run("launcher", "resume", resumed, "--from", step, *arguments, "-q")
        assert again.exit_code == 0, again.stderr
        assert lrs_of(resumed) == lrs
        assert lrs_of(resumed) == pytest.approx(expected_lrs(resumed), rel=1e-15)


def test_a_class_of_torch_is_exact_after_a_resumption(run: Commands) -> None:
    """The learning rate of a class that counts epochs is the same resumed on other ranks."""
    schedule = "schedule=torch_schedule('StepLR', step_size=2, gamma=0.5, per='epoch')"
    whole = run.folder / "whole"
    done = run(
        "launcher", "run", GRIDDED, "-n", "2", schedule, "checkpoint_every=7", "--out", whole, "-q"
    )
    assert done.exit_code == 0, done.stderr
    optimizer = SGD([torch.zeros(1)], lr=0.05)
    scheduler, expected = StepLR(optimizer, step_size=2, gamma=0.5), []
    optimizer.step()  # without which torch warns
    for step in range(1, 19):
        expected.append(optimizer.param_groups[0]["lr"])
        if step % 4 == 0:
            scheduler.step()
    assert lrs_of(whole) == expected
    again = run("launcher", "resume", whole, "--from", "14", "-n", "1", "-q")
    assert again.exit_code == 0, again.stderr
    assert lrs_of(whole) == expected
    refused = run(
        "launcher", "run", GRIDDED, "-n", "1", "schedule=torch_schedule('StepLR')", "--out", "bad"
    )
    assert (refused.exit_code, "step_size" in refused.stderr) == (2, True)
