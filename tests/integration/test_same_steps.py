"""`launcher run` takes the same optimizer steps on any number of ranks.

test_matrix.py covers strategies, accumulation and optimizers on the same engine.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ROOT, Commands, read_lines

from launcher.engine.probes.parity import Trace, compare, read_trace
from launcher.runs.rundir import RunDir

RECIPE = ROOT / "tests/recipes/worlds.py"


def train(run: Commands, name: str, recipe: str, *arguments: str) -> Path:
    """Train with `launcher run` into a folder called `name`."""
    done = run("launcher", "run", f"{RECIPE}:{recipe}", "--out", name, *arguments)
    assert done.exit_code == 0, done.stderr
    return run.folder / name


@pytest.fixture(scope="module", params=["worlds", "tokens"])
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(module_run: Commands, recipe: str) -> Path:
    return train(module_run, f"{recipe}-alone", recipe, "-n", "1")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("-n", "2", "num_workers=4"), id="2-ranks-4-workers"),
        pytest.param(("-n", "3", "micro_batch_size=8"), id="3-ranks-ragged-accumulation"),
    ],
)
def test_the_world_changes_nothing(
    module_run: Commands, recipe: str, alone: Path, arguments: tuple[str, ...]
) -> None:
    """On any number of ranks, sample ids and learning rates are equal, losses and weights agree."""
    name = "-".join([recipe, *arguments]).replace("=", "-")
    other = train(module_run, name, recipe, *arguments)
    difference = compare(read(alone), read(other), 1e-5)
    assert difference.agrees, difference
    for key in ("step", "epoch", "samples"):
        assert values(other, key) == values(alone, key)
    for own, theirs in zip(values(alone, "evaluation"), values(other, "evaluation"), strict=True):
        assert theirs == pytest.approx(own, rel=1e-5)


def read(folder: Path) -> Trace:
    """Return the trace of a run."""
    return read_trace(RunDir(folder))


def values(folder: Path, key: str) -> list[object]:
    """Return the values of `key` in metrics.jsonl, line by line."""
    return [row[key] for row in read_lines(folder / "metrics.jsonl") if key in row]


def test_an_epoch_takes_each_sample_once(alone: Path) -> None:
    """The five steps of an epoch visit all 250 samples, in a different order in each epoch."""
    samples = read(alone).samples
    epochs = [samples[start : start + 5] for start in (0, 5, 10)]
    for epoch in epochs:
        assert sorted(index for step in epoch for index in step) == list(range(250))
    assert epochs[0] != epochs[1]
    assert [len(step) for step in samples] == [62, 62, 62, 62, 2] * 3
