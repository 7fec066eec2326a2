"""Evaluation sets and metrics over all predictions, on several ranks under every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matrix import EXACTLY, SOURCE_RANKS, JudgedCase, evaluations
from support import Commands, read_lines, train_suite

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
    return {row["step"]: row["evaluation"] for row in rows if "evaluation" in row}


@pytest.mark.parametrize(
    ("ranks", "case"), CASES, ids=[f"{ranks}-{case.key}" for ranks, case in CASES]
)
def test_metrics_do_not_depend_on_the_ranks(trained: Path, ranks: int, case: JudgedCase) -> None:
    """Every metric of every set is that of one process, to the bit where sums are exact."""
    is_exact = case.options == EXACTLY
    reference = evaluated(trained / "on1" / JudgedCase(options=EXACTLY if is_exact else ()).key)
    folders = [case.key, *([f"{case.key}-resumed"] if case.is_resumed else [])]
    for values in [evaluated(trained / f"on{ranks}" / name) for name in folders]:
        assert {step: list(metrics) for step, metrics in values.items()} == {
            3: [f"dev/{name}" for name in METRICS],
            6: [f"dev/{name}" for name in METRICS],
            8: [f"{part}/{name}" for part in ("dev", "test") for name in METRICS],
        }
        for step, metrics in values.items():
            expected = reference[step]
            assert metrics == (expected if is_exact else pytest.approx(expected, rel=1e-4))
            assert metrics["dev/plain/count"] == 23
            assert metrics["dev/plain/total"] == pytest.approx(metrics["dev/listed"], rel=1e-5)
            assert metrics["dev/several/top1"] == pytest.approx(metrics["dev/accuracy"])
