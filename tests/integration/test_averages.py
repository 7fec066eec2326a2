"""Averaged weights under zero1 and zero3, and with statistics of norms, resumed and evaluated.

Those under the other strategies are in test_evaluations.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from matrix import (
    AVERAGED,
    AVERAGED_BITS,
    AVERAGED_NORMS,
    AVERAGED_WORLDS,
    BitsCase,
    Case,
    averaged,
)
from support import Commands, read_lines, read_weights, train_suite

from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir

CASES = [
    (ranks, case)
    for ranks in AVERAGED_WORLDS
    for case, _ in averaged(ranks)
    if isinstance(case, Case)
]


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train every case, and resume some from a checkpoint of other ranks and another strategy."""
    return train_suite(module_run, "averaged", AVERAGED_WORLDS)


def evaluations(folder: Path) -> dict[int, float]:
    """Return the loss of each evaluation of a run, by step."""
    rows = read_lines(RunDir(folder).metrics)
    return {row["step"]: row["evaluation"]["loss"] for row in rows if "evaluation" in row}


@pytest.mark.parametrize(
    ("ranks", "case"), CASES, ids=[f"{ranks}-{case.key}" for ranks, case in CASES]
)
def test_the_ranks_change_nothing_but_rounding(trained: Path, ranks: int, case: Case) -> None:
    """Evaluations and exported weights are those of one process, also after a resume."""
    norms = case == AVERAGED_NORMS
    alone = trained / "on1" / (AVERAGED_NORMS if norms else AVERAGED["ddp"]).key
    folder = trained / f"on{ranks}" / case.key
    expected, found = evaluations(alone), evaluations(folder)
    assert found.keys() == expected.keys()
    assert len(found) >= (2 if norms else 4)
    assert all(math.isclose(found[step], expected[step], rel_tol=1e-5) for step in found)
    expected_weights, weights = read_weights(alone), read_weights(folder)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("folder", [f"on{ranks}" for ranks in AVERAGED_WORLDS])
def test_exact_runs_have_the_same_averages(trained: Path, folder: str) -> None:
    """With exact sums, averages of weights and statistics are equal to the bit, also resumed."""
    alone = trained / "on1" / AVERAGED_BITS["ddp"].key
    expected = read_weights(alone)
    runs = [trained / folder / case.key for case in AVERAGED_BITS.values()]
    runs = [run for run in runs if run.is_dir()]
    assert runs
    for run in runs:
        weights = read_weights(run)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected), run
        assert evaluations(run) == evaluations(alone)


def test_the_average_is_not_the_last_weights(trained: Path) -> None:
    """A checkpoint holds weights, statistics and the averages of both, which differ."""
    from launcher.engine.saving.checkpoint_tensors import StoredState

    folder = trained / "on1" / AVERAGED_NORMS.key
    checkpoint = list_checkpoints(RunDir(folder))[0]
    manifest = checkpoint.read_manifest()
    assert manifest.values["averaging"] == {"averaging": "tail(start=0.2)", "count": 8}
    state, exported = StoredState(checkpoint, manifest), read_weights(folder)
    for name in ("0.weight", "1.0.norm.running_var"):
        kind = "buffer/" if "running" in name else "model/"
        last = torch.empty_like(exported[name])
        state.read({kind + name: last})
        assert not torch.equal(exported[name], last)
    averages = {name.partition("@")[0] for name in state.names() if name.startswith("average/")}
    assert {"average/0.weight", "average/1.0.norm.running_var"} <= averages


@pytest.mark.parametrize("case", [case for case, _ in averaged(3)], ids=lambda case: case.key)
def test_evaluating_a_run_gives_what_it_recorded(trained: Path, case: Case | BitsCase) -> None:
    """Final weights, or those of a checkpoint, evaluate to the last values of the run, bit by bit.

    This holds for averages under every strategy, and for statistics of virtual ranks.
    """
    folder = trained / "on3" / case.key
    recorded = [
        row["evaluation"] for row in read_lines(RunDir(folder).metrics) if "evaluation" in row
    ]
    evaluated = json.loads((folder / "evaluated.json").read_text())
    assert evaluated
    assert all(values == recorded[-1] for values in evaluated.values())
