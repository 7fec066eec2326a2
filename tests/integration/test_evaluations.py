"""Everything around the loop on 1 to 3 ranks under ddp, fsdp and zero2: one recipe, many numbers.

benchmarks/around_the_loop.py prints the largest differences that these tests allow for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import JUDGED_STEPS, SOURCE_RANKS, JudgedCase, evaluations
from safetensors.torch import load_file
from support import Commands, read_lines, train_suite
from torch import Tensor

from launcher.engine.saving.checkpoint_tensors import StoredState
from launcher.runs.best import find_best_checkpoint
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir

WORLDS = (SOURCE_RANKS, 1, 3)
CASES = [(ranks, case) for ranks in WORLDS for case in evaluations(ranks)]
cases = pytest.mark.parametrize(
    ("ranks", "case"), CASES, ids=[f"{ranks}-{case.key}" for ranks, case in CASES]
)
METRICS = (
    *("loss", "accuracy", "auroc", "several/f1", "several/top1", "several/top3", "highest"),
    *("pearson", "listed", "plain/total", "plain/count", "sklearn"),
)
DEV, TEST = ([f"{part}/{name}" for name in METRICS] for part in ("dev", "test"))
"""The metrics that are evaluated every three steps, and those that are evaluated at the end."""


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train every case, and resume some from a checkpoint of other ranks and another strategy."""
    return train_suite(module_run, "evaluations", WORLDS)


def evaluated(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the metrics that a run has recorded, each time with its step."""
    rows = read_lines(folder / "metrics.jsonl")
    return [(row["step"], row["evaluation"]) for row in rows if "evaluation" in row]


def logged(folder: Path) -> list[dict[str, float]]:
    """Return what the loss logged in each step, the training metric, and the loss itself."""
    rows = [row for row in read_lines(folder / "metrics.jsonl") if "lr" in row]
    return [
        {name: row[name] for name in row if name == "loss" or name.startswith("train/")}
        for row in rows
    ]


def ended(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[int]]:
    """Return the result of a run, its final weights, and the steps of its checkpoints."""
    run_dir = RunDir(folder)
    result = json.loads(run_dir.result.read_text())
    steps = [checkpoint.step for checkpoint in list_checkpoints(run_dir)]
    return result, load_file(run_dir.model), steps


@cases
def test_nothing_around_the_loop_depends_on_the_ranks(
    trained: Path, ranks: int, case: JudgedCase
) -> None:
    """Logged numbers, metrics, averages, the best checkpoint and the end are those of one process.

    So they are after a resume from other ranks and another strategy. Where sums are exact they are
    so to the bit.
    """
    is_exact = case.name == "exact"
    limit = 0.0 if is_exact else 1e-5
    alone = trained / "on1" / ("ddp-exact" if is_exact else "ddp")
    result, weights, steps = ended(alone)
    assert (result["steps"], result["weights_step"]) == (18, 9), "the recipe ends early"
    for name in [case.key, *([f"{case.key}-resumed"] if case.is_resumed else [])]:
        folder = trained / f"on{ranks}" / name
        own_result, own_weights, own_steps = ended(folder)
        assert (own_result["steps"], own_result["weights_step"], own_steps) == (18, 9, steps)
        for key, weight in own_weights.items():
            torch.testing.assert_close(weight, weights[key], rtol=limit, atol=limit)
        for (step, metrics), (own_step, expected) in zip(
            evaluated(folder), evaluated(alone), strict=True
        ):
            assert (step, list(metrics)) == (own_step, list(expected))
            assert metrics == (expected if is_exact else pytest.approx(expected, rel=1e-4))
        for row, expected in zip(logged(folder), logged(alone), strict=True):
            assert row.keys() == expected.keys()
            assert row == (expected if is_exact else pytest.approx(expected, rel=1e-5))
            assert row["train/again"] == pytest.approx(row["loss"], rel=1e-6)
        seen = [[step, metrics] for step, metrics in evaluated(folder)]
        for rank in range(ranks):
            assert json.loads((folder / f"witness{rank}.json").read_text()) == seen


@cases
def test_metrics_over_all_predictions_are_those_of_the_whole_set(
    trained: Path, ranks: int, case: JudgedCase
) -> None:
    """The AUROC is scikit-learn's, and metrics that depend on the order of samples agree."""
    for step, metrics in evaluated(trained / f"on{ranks}" / case.key):
        for part, count in (("dev", 23), ("test", 7)):
            if f"{part}/loss" not in metrics:
                continue
            values = {name: metrics[f"{part}/{name}"] for name in METRICS}
            assert values["auroc"] == pytest.approx(values["sklearn"], abs=1e-6), step
            assert values["plain/count"] == count
            assert values["plain/total"] == pytest.approx(values["listed"], rel=1e-5)
            assert values["several/top1"] == pytest.approx(values["accuracy"])


@cases
def test_weights_are_evaluated_and_predict_as_in_the_run(
    trained: Path, ranks: int, case: JudgedCase
) -> None:
    """The run's metrics come again to the bit, and the file of predictions is always the same.

    Its AUROC, by scikit-learn, is the one that the run recorded.
    """
    from sklearn.metrics import roc_auc_score

    folder = trained / f"on{ranks}" / case.key
    found = json.loads((folder / "evaluated.json").read_text())
    recorded = {step: metrics for step, metrics in evaluated(folder) if "dev/loss" in metrics}
    if case.strategy == "zero2":
        assert found["step-00000018"] == {**recorded[18], **evaluated(folder)[-1][1]}
    else:
        best = found["model.safetensors"]
        assert {name: best[name] for name in DEV} == recorded[JUDGED_STEPS["best"]]
    source = trained / f"on{SOURCE_RANKS}/ddp"
    rows = read_lines(folder / "predictions.jsonl")
    score = roc_auc_score(
        [row["label"] for row in rows], [row["probabilities"] for row in rows], multi_class="ovr"
    )
    assert score == pytest.approx(ended(source)[0]["best"]["value"], abs=1e-6)
    expected = (source / "predictions.jsonl").read_bytes()
    assert case.name == "split" or (folder / "predictions.jsonl").read_bytes() == expected


def test_a_run_ends_early_with_its_best_weights(trained: Path) -> None:
    """The final weights are the averages of the best checkpoint, which is kept beside the newest.

    Without an improvement the run ends, once it has evaluated every set.
    """
    folder = trained / "on1/ddp"
    result, weights, steps = ended(folder)
    assert steps == [18, 13, 9]
    found = evaluated(folder)
    assert [(step, list(metrics)) for step, metrics in found] == [
        *((step, DEV) for step in range(3, 19, 3)),
        (18, TEST),
    ]
    assert result["best"] == {
        "metric": "dev/auroc",
        "value": dict(found)[9]["dev/auroc"],
        "step": 9,
        "ended_after": 3,
    }
    assert result["evaluation"] == {**found[-2][1], **found[-1][1]}
    best = find_best_checkpoint(RunDir(folder))
    state = StoredState(best, best.read_manifest())
    for kind in ("average", "model"):
        saved = {f"{kind}/{name}": torch.empty_like(weight) for name, weight in weights.items()}
        state.read(saved)
        for name, weight in weights.items():
            assert torch.equal(saved[f"{kind}/{name}"], weight) == (kind == "average")
