"""Every strategy, with and without accumulation, under both optimizers, on 1 to 4 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from matrix import WORLDS, Case, cases
from support import ROOT, Commands

from launcher.engine.compare import Trace, compare, read_trace
from launcher.rundir import RunDir

MATRIX = [(ranks, case) for ranks in WORLDS for case in cases(ranks)]


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train the whole matrix, one number of ranks after the other."""
    for ranks in WORLDS:
        done = module_run(
            *("torchrun", "--standalone", "--nproc-per-node", str(ranks)),
            *(ROOT / "tests/matrix.py", f"on{ranks}"),
            timeout=400,
        )
        assert done.exit_code == 0, done.stdout + done.stderr
    return module_run.folder


def trace(trained: Path, ranks: int, case: Case) -> Trace:
    """Read what a case left behind."""
    return read_trace(RunDir(trained / f"on{ranks}" / case.key))


@pytest.mark.parametrize(
    ("ranks", "case"), MATRIX, ids=[f"{ranks}-{case.key}" for ranks, case in MATRIX]
)
def test_the_strategy_changes_nothing(trained: Path, ranks: int, case: Case) -> None:
    """It takes the steps of one process and one micro-batch: exactly, or to 1e-5 for rounding."""
    wanted = trace(trained, 1, Case(case.name, "ddp", 1, case.optimizer))
    found = trace(trained, ranks, case)
    assert len(found.loss) == 10
    difference = compare(wanted, found, 1e-5)
    assert difference.agrees, difference
