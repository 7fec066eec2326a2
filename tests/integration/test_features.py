"""Settings for speed and memory change no optimizer step, under any strategy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matrix import DOUBLE, Case, features
from support import Commands, read_lines, train_suite

from launcher.checks.prove import TOLERANCES
from launcher.engine.probes.parity import compare, read_trace
from launcher.runs.rundir import RunDir

WORLDS = (1, 2, 3)
CASES = [(ranks, case) for ranks in WORLDS for case in features(ranks)]


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train every case, on one number of ranks after the other."""
    return train_suite(module_run, "features", WORLDS)


@pytest.mark.parametrize(
    ("ranks", "case"), CASES, ids=[f"{ranks}-{case.key}" for ranks, case in CASES]
)
def test_a_setting_changes_no_step(trained: Path, ranks: int, case: Case) -> None:
    """With a setting, the steps are those of one process without it, to rounding."""
    precision = str(dict(case.options).get("precision", "fp32"))
    plain = replace(
        case, strategy="ddp", accumulation=1, options=DOUBLE if precision == "fp64" else ()
    )
    reference = read_trace(RunDir(trained / "on1" / plain.key))
    trace = read_trace(RunDir(trained / f"on{ranks}" / case.key))
    difference = compare(reference, trace, TOLERANCES[precision])
    assert difference.agrees, difference
    if precision in ("bf16", "fp16"):
        assert difference.loss > 1e-6, "it was not computed in that precision"


def test_every_strategy_evaluates_alike(trained: Path) -> None:
    """Evaluations with BatchNorm agree between strategies and numbers of ranks."""
    values = {
        (ranks, case.key): evaluation
        for ranks, case in CASES
        if case.recipe == "batch_norm"
        for row in read_lines(trained / f"on{ranks}" / case.key / "metrics.jsonl")
        if (evaluation := row.get("evaluation")) and row["step"] == 10
    }
    losses = [value["loss"] for value in values.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4), values
