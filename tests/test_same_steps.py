"""The promise: the same recipe takes the same optimizer steps on any number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, Commands, read_lines

RECIPE = ROOT / "tests/recipes/worlds.py"


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[list[int]]
    """The sample ids of each step over all ranks and micro-steps, sorted."""

    weights: dict[str, torch.Tensor]


def read_run(folder: Path) -> Run:
    """Read a run folder."""
    rows = read_lines(folder / "metrics.jsonl")
    samples: dict[int, list[int]] = {}
    for path in (folder / "samples").iterdir():
        for line in read_lines(path):
            taken = samples.setdefault(line["step"], [])
            taken += [index for micro_batch in line["micro_batches"] for index in micro_batch]
    return Run(
        steps=[row for row in rows if "loss" in row],
        evaluations=[row["evaluation"] for row in rows if "evaluation" in row],
        samples=[sorted(samples[step]) for step in sorted(samples)],
        weights=load_file(folder / "model.safetensors"),
    )


def train(run: Commands, name: str, recipe: str, *arguments: str) -> Run:
    """Train in a folder called `name`."""
    done = run("launcher", "run", f"{RECIPE}:{recipe}", "--out", name, *arguments)
    assert done.exit_code == 0, done.stderr
    return read_run(run.folder / name)


@pytest.fixture(scope="module", params=["worlds", "tokens"])
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(module_run: Commands, recipe: str) -> Run:
    return train(module_run, f"{recipe}-alone", recipe, "-n", "1")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("-n", "1", "micro_batch_size=16"), id="1x4-accumulation"),
        pytest.param(("-n", "2", "num_workers=4"), id="2-ranks-4-workers"),
        pytest.param(("-n", "3", "micro_batch_size=8"), id="3-ranks-ragged-accumulation"),
        pytest.param(("-n", "4", "num_workers=1"), id="4-ranks"),
    ],
)
def test_the_world_changes_nothing(
    module_run: Commands, recipe: str, alone: Run, arguments: tuple[str, ...]
) -> None:
    """Sample ids and learning rates are equal; losses, norms and weights agree to rounding."""
    name = "-".join([recipe, *arguments]).replace("=", "-")
    other = train(module_run, name, recipe, *arguments)
    assert other.samples == alone.samples
    for key in ("step", "epoch", "samples", "lr"):
        assert [row[key] for row in other.steps] == [row[key] for row in alone.steps]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in other.steps] == pytest.approx(
            [row[key] for row in alone.steps], rel=1e-5
        )
    for own, theirs in zip(alone.evaluations, other.evaluations, strict=True):
        assert theirs == pytest.approx(own, rel=1e-5)
    assert other.weights.keys() == alone.weights.keys()
    for key, weight in alone.weights.items():
        assert (other.weights[key] - weight).norm() <= 1e-5 * weight.norm(), key


def test_an_epoch_takes_each_sample_once(alone: Run) -> None:
    """The five steps of an epoch visit all 250 samples, in another order in each epoch."""
    epochs = [alone.samples[start : start + 5] for start in (0, 5, 10)]
    for epoch in epochs:
        assert sorted(index for step in epoch for index in step) == list(range(250))
    assert epochs[0] != epochs[1]
    assert [len(step) for step in alone.samples] == [62, 62, 62, 62, 2] * 3
