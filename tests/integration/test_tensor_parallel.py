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


@pytest.mark.parametrize(
    ("recipe", "settings", "parts"),
    [
        ("pretrain_lm", ("tensor_parallel=3", "-n", "3"), ("embed_tokens", "256", "3")),
        ("gpt", ("tensor_parallel=4", "-n", "4", "heads=6", "width=96"), ("6 (heads)", "4")),
        ("digits", ("tensor_parallel=2", "-n", "2"), ("tensor_parallel_plan", "2")),
    ],
)
def test_a_model_that_cannot_be_split_starts_no_rank(
    run: Commands, recipe: str, settings: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    """The module and the numbers are named with exit code 2, and no run folder is made."""
    done = run("launcher", "run", recipe, *settings, "strategy=fsdp", "device=cpu", "batch_size=12")
    assert done.exit_code == 2, done.stdout + done.stderr
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert list(run.folder.iterdir()) == []


def test_a_resumed_run_that_cannot_be_split_keeps_its_folder(run: Commands) -> None:
    """A resumption with tensor_parallel is refused before it is recorded in run.yaml."""
    settings = ("-n", "1", "device=cpu", "steps=2", "checkpoint_every=1", "-q", "--out", "run")
    done = run("launcher", "run", "digits", *settings)
    assert done.exit_code == 0, done.stderr
    before = (run.folder / "run/run.yaml").read_bytes()
    options = ("-n", "2", "strategy=fsdp", "tensor_parallel=2", "steps=3")
    done = run("launcher", "resume", "run", *options)
    assert done.exit_code == 2, done.stdout + done.stderr
    assert "tensor_parallel_plan" in done.stderr
    assert (run.folder / "run/run.yaml").read_bytes() == before
    assert not (run.folder / "run/logs/rank1.log").exists()
