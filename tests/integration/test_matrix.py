"""Every strategy, with and without accumulation, under both optimizers, on 1 to 4 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from matrix import Case, matrix
from support import Commands, train_suite

from launcher.engine.probes.parity import compare, read_trace
from launcher.runs.rundir import RunDir

WORLDS = (1, 2, 3, 4)
CASES = [(ranks, case) for ranks in WORLDS for case in matrix(ranks)]


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train the whole matrix, on one number of ranks after the other."""
    return train_suite(module_run, "matrix", WORLDS)


@pytest.mark.parametrize(
    ("ranks", "case"), CASES, ids=[f"{ranks}-{case.key}" for ranks, case in CASES]
)
def test_the_strategy_changes_nothing(trained: Path, ranks: int, case: Case) -> None:
    """Each case takes the steps of one process with one micro-batch, to 1e-5."""
    alone = Case(case.recipe, optimizer=case.optimizer, options=case.options)
    reference = read_trace(RunDir(trained / "on1" / alone.key))
    trace = read_trace(RunDir(trained / f"on{ranks}" / case.key))
    assert len(trace.loss) == case.steps
    difference = compare(reference, trace, 1e-5)
    assert difference.agrees, difference
