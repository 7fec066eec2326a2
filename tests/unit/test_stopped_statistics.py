"""BatchNorm's running statistics of virtual ranks in a run that ends early and goes on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from small_runs import recipe, train
from torch import nn

from launcher.runs.job import ResumeFrom


def build_norm() -> nn.Module:
    """Return a linear layer, BatchNorm and another linear layer."""
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))


def test_a_run_that_went_on_has_the_statistics_of_one_that_did_not_end(tmp_path: Path) -> None:
    """A checkpoint at an end between evaluations holds those of each virtual rank, not means."""
    trained = recipe(model=build_norm, virtual_ranks=4, epochs=None, steps=12, evaluate_every=100)
    whole = load_file(train(tmp_path / "whole", trained).model)
    train(tmp_path / "parts", trained, stop_at=5)
    resumed = load_file(train(tmp_path / "parts", trained, ResumeFrom(step=5)).model)
    assert whole.keys() == resumed.keys()
    for name, values in whole.items():
        assert torch.equal(values, resumed[name]), name
