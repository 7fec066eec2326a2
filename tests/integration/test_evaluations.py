"""Evaluation sets, metrics over all predictions and best checkpoints, on several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import SOURCE_RANKS, JudgedCase, evaluations
from safetensors.torch import load_file
from support import Commands, read_lines, train_suite
from torch import Tensor

from launcher.engine.saving.checkpoint_tensors import StoredState
from launcher.runs.best import find_best_checkpoint
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir

WORLDS = (SOURCE_RANKS, 1, 3)
CASES = [(ranks, case) for ranks in WORLDS for case in evaluations(ranks)]
METRICS = (
    *("loss", "accuracy", "auroc", "several/f1", "several/top1", "several/top3", "highest"),
    *("pearson", "listed", "plain/total", "plain/count"),
)


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train every case, and resume some from a checkpoint of another number of ranks."""
    return train_suite(module_run, "evaluations", WORLDS)


def evaluated(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the metrics that a run has recorded, by step."""
    rows = read_lines(folder / "metrics.jsonl")
    values: dict[int, dict[str, Any]] = {}
    for row in rows:
        if "evaluation" in row:
            values.setdefault(row["step"], {}).update(row["evaluation"])
    return values


NAMES = {
    3: [f"dev/{name}" for name in METRICS],
    6: [f"dev/{name}" for name in METRICS],
    8: [f"{part}/{name}" for part in ("dev", "test") for name in METRICS],
}
"""The metrics that are evaluated after each step."""


def ended(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[int]]:
    """Return the result of a run, its final weights, and the steps of its checkpoints."""
    run_dir = RunDir(folder)
    result = json.loads(run_dir.result.read_text())
    steps = [checkpoint.step for checkpoint in list_checkpoints(run_dir)]
    return result, load_file(run_dir.model), steps


@pytest.mark.parametrize(
    ("ranks", "case"), CASES, ids=[f"{ranks}-{case.key}" for ranks, case in CASES]
)
def test_evaluations_do_not_depend_on_the_ranks(
    trained: Path, ranks: int, case: JudgedCase
) -> None:
    """Metrics of every set, the best weights and the end are those of one process.

    Where sums are exact they are so to the bit.
    """
    is_exact = case.name == "exact"
    of_one = JudgedCase(name=case.name if case.name in ("exact", "early") else "")
    reference = evaluated(trained / "on1" / of_one.key)
    result, weights, steps = ended(trained / "on1" / of_one.key)
    for name in [case.key, *([f"{case.key}-resumed"] if case.is_resumed else [])]:
        values = evaluated(trained / f"on{ranks}" / name)
        own_result, own_weights, own_steps = ended(trained / f"on{ranks}" / name)
        assert own_steps == steps
        assert own_result["weights_step"] == result["weights_step"]
        for key, weight in own_weights.items():
            limit = 0.0 if is_exact else 1e-5
            torch.testing.assert_close(weight, weights[key], rtol=limit, atol=limit)
        for step, metrics in values.items():
            expected = reference[step]
            assert metrics == (expected if is_exact else pytest.approx(expected, rel=1e-4))
        if case.name != "early":
            assert {step: list(metrics) for step, metrics in values.items()} == NAMES
            last = values[8]
            assert last["dev/plain/count"] == 23
            assert last["dev/plain/total"] == pytest.approx(last["dev/listed"], rel=1e-5)
            assert last["dev/several/top1"] == pytest.approx(last["dev/accuracy"])


def test_a_run_ends_with_its_best_weights(trained: Path) -> None:
    """The final weights are those of the best checkpoint, which is kept besides the newest ones."""
    folder = trained / "on1/ddp"
    result, weights, steps = ended(folder)
    assert (steps, result["steps"], result["weights_step"]) == ([8, 7, 6], 8, 6)
    values = evaluated(folder)
    assert result["best"] == {
        "metric": "dev/listed",
        "value": values[6]["dev/listed"],
        "step": 6,
        "ended_after": None,
    }
    assert result["evaluation"] == values[8]
    best = find_best_checkpoint(RunDir(folder))
    state = StoredState(best, best.read_manifest())
    saved = {f"model/{name}": torch.empty_like(weight) for name, weight in weights.items()}
    state.read(saved)
    for name, weight in weights.items():
        assert torch.equal(saved[f"model/{name}"], weight)


def test_a_run_ends_early(trained: Path) -> None:
    """Without an improvement the run ends, once it has evaluated every set."""
    result, _, steps = ended(trained / "on1/ddp-early")
    assert (steps, result["steps"], result["weights_step"]) == ([6, 3], 6, 3)
    assert result["best"]["ended_after"] == 1
    assert list(result["evaluation"]) == NAMES[8]
    rows = read_lines(trained / "on1/ddp-early/metrics.jsonl")
    found = [(row["step"], list(row["evaluation"])) for row in rows if "evaluation" in row]
    tests = [name for name in NAMES[8] if name.startswith("test/")]
    assert found == [(3, NAMES[3]), (6, NAMES[6]), (6, tests)]
