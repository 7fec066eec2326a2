"""A step takes every parameter along, whichever of them a rank uses, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from matrix import Case, unused
from support import ROOT, Commands, read_lines, train_suite

from launcher.engine.probes.parity import compare, read_trace
from launcher.runs.rundir import RunDir

WORLDS = (1, 2, 3)
CASES = [(ranks, case) for ranks in WORLDS for case in unused(ranks)]
SKIPPING = f"{ROOT / 'tests/recipes/branches.py'}:skipping"


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train every case."""
    return train_suite(module_run, "unused", WORLDS)


@pytest.mark.parametrize(
    ("ranks", "case"), CASES, ids=[f"{ranks}-{case.key}" for ranks, case in CASES]
)
def test_parts_that_some_ranks_use_change_nothing(trained: Path, ranks: int, case: Case) -> None:
    """Experts that only some ranks use take the steps of one process, under every strategy."""
    alone = Case(case.recipe, optimizer=case.optimizer, options=case.options)
    wanted = read_trace(RunDir(trained / "on1" / alone.key))
    found = read_trace(RunDir(trained / f"on{ranks}" / case.key))
    assert len(found.loss) == len(wanted.loss) == 42
    difference = compare(wanted, found, 1e-5)
    assert difference.agrees, difference


def test_the_suite_is_what_it_says(trained: Path) -> None:
    """The rare branch is trained, and the weight decay alone changes what nothing uses."""
    weights = read_trace(RunDir(trained / "on1" / "branches-ddp-x1-adamw-epochs=1")).weights
    assert weights["rare.weight"].norm() > 0
    assert weights["unused.weight"].abs().max() < 0.25  # 1 / sqrt(16) at first


@pytest.mark.parametrize(
    ("settings", "exit_code", "named"),
    [
        (["strategy=fsdp"], 2, "blocks.1"),
        (["strategy=zero3"], 2, "blocks.1"),
        (["strategy=fsdp", "discard=true"], 2, "blocks.1"),
        (["strategy=zero3", "discard=true"], 2, "blocks.1"),
        (["strategy=fsdp", "first=30", "swap=true"], 1, "blocks.1"),
    ],
)
def test_blocks_that_a_rank_leaves_out_are_refused(
    run: Commands, settings: list[str], exit_code: int, named: str
) -> None:
    """Where weights are gathered by block, it is named: at once, or before any checkpoint."""
    done = run(
        *("launcher", "run", SKIPPING, "-n", "2", "-q", "hang_timeout=30", "--out", "out"),
        *settings,
    )
    assert done.exit_code == exit_code, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((run.folder / "out").glob("checkpoints/step-*"))


def test_blocks_may_be_left_out_without_sharding(run: Commands) -> None:
    """DDP trains a model of which a rank leaves a block out."""
    done = run("launcher", "run", SKIPPING, "-n", "2", "-q", "--out", "out", "steps=5")
    assert done.exit_code == 0, done.stderr
    assert len([row for row in read_lines(run.folder / "out/metrics.jsonl") if "lr" in row]) == 5
