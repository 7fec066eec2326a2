"""Layers that are split over ranks take the steps of one process, and resume as any other run."""

from __future__ import annotations

from pathlib import Path

import pytest
from splits_of_layers import DROPPING, PLAIN, REFUSED, TP, Split, cases
from support import ROOT, Commands

from launcher.engine.probes.parity import compare, read_trace
from launcher.runs.rundir import RunDir

CASES = [case for case in cases() if case != REFUSED]


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train every case."""
    done = module_run("python", ROOT / "tests/splits_of_layers.py", ".", timeout=600)
    assert done.exit_code == 0, done.stdout + done.stderr
    return module_run.folder


@pytest.mark.parametrize("case", CASES, ids=[case.folder for case in CASES])
def test_the_split_changes_nothing(trained: Path, case: Split) -> None:
    """Each case takes the steps of one process, to 1e-5, also from another split's checkpoint."""
    alone = DROPPING if case.recipe == "dropping" else Split(1, case.recipe, PLAIN)
    reference = read_trace(RunDir(trained / alone.folder))
    trace = read_trace(RunDir(trained / case.folder))
    assert len(trace.loss) == 8
    difference = compare(reference, trace, 1e-5)
    assert difference.agrees, difference


def test_ranks_of_a_group_have_the_same_weights(trained: Path) -> None:
    """What no rank has a part of is equal to the bit on the ranks of a group, with dropout."""
    folder = trained / Split(4, "dropping", TP).folder
    digests = [(folder / f"digest{rank}").read_text() for rank in range(4)]
    assert digests[0] == digests[1]
    assert digests[2] == digests[3]
    assert digests[0] != digests[2]


def test_a_plan_that_leaves_a_module_out_is_refused(trained: Path) -> None:
    """A norm of queries without its style is named before the first update, on every rank."""
    texts = [(trained / REFUSED.folder / f"refusal{rank}").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert "model.layers.0.self_attn.q_norm" in texts[0]
    assert "replicated_with_grad_allreduce" in texts[0]
