"""Tests of short trainings at several learning rates in the same process."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import INPUTS, recipe
from torch import nn
from torch.utils.data import TensorDataset

from launcher import Data, Recipe, make_plan, read_machine, sgd
from launcher.analysis.lr_trials import training_name
from launcher.engine.backends.local import LocalBackend
from launcher.engine.probes.lr_trainings import run_lr_trainings
from launcher.engine.probes.measuring import ProbeContext
from launcher.engine.ranks.output import Output
from launcher.runs.job import RecipeSource
from launcher.runs.rundir import RunDir

CALLS: list[str] = []


def noisy(inputs: Any = INPUTS) -> Data:
    """Return tensors with noise of the global generator, and count the call."""
    CALLS.append("data")
    drawn = inputs + 0.1 * torch.randn(inputs.shape)
    return Data(train=TensorDataset(drawn[:40]), evaluation=TensorDataset(drawn[40:]))


def searched(**changes: Any) -> Recipe:
    """Return a training whose data, weights and masks are drawn."""
    model = {"model": lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 1))}
    return recipe(data=noisy, optimizer=sgd(momentum=0.5), **model, **changes)


def search(folder: Path, lr: float) -> dict[float, float]:
    """Train around a learning rate, and return the losses by learning rate."""
    folder.mkdir()
    trained = searched(lr=lr)
    plan = make_plan(trained, read_machine(), nproc_per_node=1)
    probe = ProbeContext(
        recipe=trained,
        source=RecipeSource(recipe="unknown"),
        plan=plan,
        backend=LocalBackend(trained, plan),
        run_dir=RunDir(folder),
        output=Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO()),
        report_phase=lambda *_: None,
    )
    run_lr_trainings(probe)
    trials = json.loads((folder / "trials.json").read_text())["trials"]
    return {trial["lr"]: trial["loss"] for trial in trials}


def test_a_training_does_not_depend_on_those_before(tmp_path: Path) -> None:
    """A learning rate has one loss, wherever in a search it is tried; the data is read once."""
    CALLS.clear()
    first = search(tmp_path / "first", 0.01)
    assert len(CALLS) == 1
    assert len(first) > 2
    later = search(tmp_path / "later", sorted(first)[1])
    both = [lr for lr in first if any(lr == pytest.approx(other) for other in later)]
    assert len(both) > 1
    exact = {f"{lr:.6g}": loss for lr, loss in later.items()}
    for lr in both:
        assert exact[f"{lr:.6g}"] == pytest.approx(first[lr], rel=1e-6)
    curve = json.loads((tmp_path / "first" / training_name(0.01) / "curve.json").read_text())
    assert len(curve["losses"]) == 6
