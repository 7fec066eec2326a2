"""Tests of models that use only some of their parameters in a step."""

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
def test_steps_do_not_depend_on_which_ranks_use_a_part(
    trained: Path, ranks: int, case: Case
) -> None:
    """Experts that only some ranks use take the steps of one process, under every strategy."""
    options = tuple(option for option in case.options if option[0] != "offload")
    one_rank_case = Case(case.recipe, optimizer=case.optimizer, options=options)
    expected = read_trace(RunDir(trained / "on1" / one_rank_case.key))
    actual = read_trace(RunDir(trained / f"on{ranks}" / case.key))
    assert len(actual.loss) == len(expected.loss) == 42
    difference = compare(expected, actual, 1e-5)
    assert difference.agrees, difference


def test_the_suite_covers_rare_and_unused_parts(trained: Path) -> None:
    """The rare branch is trained, and only weight decay changes the unused layer."""
    weights = read_trace(RunDir(trained / "on1" / "branches-ddp-x1-adamw-epochs=1")).weights
    assert weights["rare.weight"].norm() > 0
    assert weights["unused.weight"].abs().max() < 0.25  # the initial bound is 1 / sqrt(16)


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
def test_a_skipped_block_is_refused_under_sharding(
    run: Commands, settings: list[str], exit_code: int, named: str
) -> None:
    """A block that one rank skips is named before the next checkpoint, under FSDP and ZeRO-3."""
    done = run(
        *("launcher", "run", SKIPPING, "-n", "2", "-q", "--out", "out"),
        *("hang_timeout=start:60,step:30", *settings),
    )
    assert done.exit_code == exit_code, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    saved = [path.name for path in (run.folder / "out").glob("checkpoints/step-*")]
    assert saved == (["step-00000005"] if "first=30" in settings else [])  # before pass 30


def test_a_skipped_block_is_accepted_under_ddp(run: Commands) -> None:
    """DDP trains a model in which one rank skips a block."""
    done = run("launcher", "run", SKIPPING, "-n", "2", "-q", "--out", "out", "steps=5")
    assert done.exit_code == 0, done.stderr
    assert len([row for row in read_lines(run.folder / "out/metrics.jsonl") if "lr" in row]) == 5
