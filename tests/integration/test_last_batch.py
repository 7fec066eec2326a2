"""BatchNorm where a share of a batch has one sample: cut around it, or refused before step 1."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from support import ROOT, Commands, read_lines

from launcher.planning.global_batch import BatchSplit

RECIPE = str(ROOT / "tests/recipes/normed.py")


def test_no_micro_batch_of_one_that_can_be_avoided() -> None:
    """Every way to cut a batch takes each sample once, within the limit; pairs have no single."""
    paired = 0
    for size, world_size, most in itertools.product(range(1, 33), range(1, 6), range(1, 6)):
        cut = BatchSplit(world_size=world_size, micro_batch_size=most, statistics="rank")
        parts = [
            [cut.positions(size, rank, step) for step in range(cut.micro_steps(size))]
            for rank in range(world_size)
        ]
        every = [index for of_rank in parts for own in of_rank for index in own]
        assert every == list(range(size))
        sizes = [len(own) for of_rank in parts for own in of_rank]
        assert max(sizes) <= most
        assert all(any(of_rank[step] for of_rank in parts) for step in range(len(parts[0])))
        assert (1 in sizes) == cut.is_lone(size)
        if cut.is_lone(size):
            assert size == 1 or most == 1 or (most == 2 and size % 2)
        paired += cut.is_paired(size)
    assert paired > 50


def test_synchronised_statistics_are_over_two_samples() -> None:
    """Over all ranks, a micro-step has a single sample where nothing else is possible alone."""
    for size, world_size, most in itertools.product(range(1, 33), range(1, 6), range(1, 6)):
        cut = BatchSplit(world_size=world_size, micro_batch_size=most, statistics="all")
        counts = [
            sum(len(cut.positions(size, rank, step)) for rank in range(world_size))
            for step in range(cut.micro_steps(size))
        ]
        assert sum(counts) == size
        assert 0 not in counts
        assert (1 in counts) == cut.is_lone(size)


def losses(run: Commands, name: str, *arguments: str) -> list[float]:
    """Train in a folder called `name`; return the losses of the steps."""
    done = run("launcher", "run", RECIPE, "--out", name, *arguments)
    assert done.exit_code == 0, done.stderr
    return [row["loss"] for row in read_lines(run.folder / name / "metrics.jsonl") if "loss" in row]


def test_a_last_batch_of_two_trains(run: Commands) -> None:
    """Two ranks take the last 2 of 34 samples as one rank does: together, with each counted."""
    assert len(losses(run, "out", "-n", "2", "samples=34", "record_samples=true")) == 3
    last = [read_lines(run.folder / f"out/samples/rank{rank}.jsonl")[2] for rank in range(2)]
    assert [sum(map(len, row["micro_batches"])) for row in last] == [2, 0]


def test_a_last_batch_of_one_is_the_same_on_any_ranks(run: Commands) -> None:
    """The running statistics normalise it; with sync_batchnorm the steps are those of one rank."""
    alone = losses(run, "alone", "-n", "1", "samples=33")
    together = losses(run, "together", "-n", "3", "samples=33", "sync_batchnorm=true")
    assert len(alone) == 3
    assert together == pytest.approx(alone, rel=1e-4)


def test_micro_batches_of_two_train(run: Commands) -> None:
    """Two ranks cut 6 samples into 2 + 2 and 2, within micro_batch_size=2, as one rank does."""
    settings = ("samples=36", "batch_size=6", "micro_batch_size=2")
    assert len(losses(run, "out", "-n", "2", *settings)) == 6


@pytest.mark.parametrize(
    "arguments", [("-n", "2", "batch_size=2"), ("-n", "1", "micro_batch_size=1")]
)
def test_full_batches_of_single_samples_are_refused(
    run: Commands, arguments: tuple[str, ...]
) -> None:
    """Before a step is taken, in one message that says what helps."""
    done = run("launcher", "run", RECIPE, "samples=34", "--out", "out", *arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr
    assert "sync_batchnorm=true" in done.stderr
    assert not losses_of(run.folder / "out")


def losses_of(folder: Path) -> list[float]:
    """Return the losses that a run has recorded."""
    path = folder / "metrics.jsonl"
    return [row["loss"] for row in read_lines(path) if "loss" in row] if path.exists() else []


def test_plan_and_check_foresee_it(run: Commands) -> None:
    """The plan says which batches are cut otherwise; a check says it of a model with BatchNorm."""
    done = run("launcher", "plan", RECIPE, "-n", "2", "samples=34", "--json")
    notes = [note for note in json.loads(done.stdout)["notes"] if "BatchNorm" in note]
    assert any("batch of 2 samples" in note for note in notes)
    done = run("launcher", "plan", RECIPE, "-n", "2", "samples=32", "--json")
    assert "no micro-batch has exactly" not in done.stdout
    done = run("launcher", "check", RECIPE, "samples=34", "--json")
    assert "batch of 2 samples" in done.stdout


@pytest.mark.parametrize("ranks", ["1", "3"])
def test_it_goes_on_on_other_ranks(run: Commands, ranks: str) -> None:
    """Ranks that have had fewer micro-batches than others leave a checkpoint for any number."""
    losses(run, "out", "-n", "2", "samples=34")
    done = run("launcher", "resume", "out", "-n", ranks, "epochs=2")
    assert done.exit_code == 0, done.stderr
