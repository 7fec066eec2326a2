"""Recipes with virtual ranks and exact sums train to the same bits on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matrix import BITS_RESUMED_FROM, BITS_WORLDS, SOURCE_RANKS, BitsCase, bits
from support import Commands, train_suite

from launcher.engine.probes.parity import checkpoint_digest, read_trace
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir

CASES = [(ranks, case) for ranks in BITS_WORLDS for case in bits(ranks)]


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train every case, and resume some from a checkpoint of another number of ranks."""
    return train_suite(module_run, "bits", BITS_WORLDS)


def final_digest(run_dir: RunDir) -> str:
    """Return the digest of weights, optimizer state and buffers after the last step."""
    newest = list_checkpoints(run_dir)[0]
    assert newest.step > BITS_RESUMED_FROM
    return checkpoint_digest(newest)


@pytest.mark.parametrize(
    ("ranks", "case"), CASES, ids=[f"{ranks}-{case.key}" for ranks, case in CASES]
)
def test_the_bits_do_not_depend_on_the_ranks(trained: Path, ranks: int, case: BitsCase) -> None:
    """Weights, optimizer state, BatchNorm's statistics and losses equal those of one process.

    In mixed precision, FSDP gathers weights in that precision; its runs equal each other.
    """
    reference = RunDir(trained / "on1" / f"{case.workload}-ddp")
    if case.strategy == "fsdp" and "precision" in dict(case.options):
        reference = RunDir(trained / f"on{SOURCE_RANKS}" / replace(case, shard="node").key)
    run_dir = RunDir(trained / f"on{ranks}" / case.key)
    assert final_digest(run_dir) == final_digest(reference)
    one, other = read_trace(reference), read_trace(run_dir)
    assert other.samples == one.samples
    assert (other.loss, other.grad_norm) == (one.loss, one.grad_norm)
    if case.is_resumed:
        resumed = RunDir(trained / f"on{ranks}" / f"{case.key}-resumed")
        assert final_digest(resumed) == final_digest(reference)
