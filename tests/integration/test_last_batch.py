"""BatchNorm and micro-batches of one sample, which are avoided, or refused before step 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import ROOT, Commands, read_lines

RECIPE = str(ROOT / "tests/recipes/normed.py")


def losses(run: Commands, name: str, *arguments: str) -> list[float]:
    """Train in a folder called `name`, and return the losses of the steps."""
    done = run("launcher", "run", RECIPE, "--out", name, *arguments)
    assert done.exit_code == 0, done.stderr
    return [row["loss"] for row in read_lines(run.folder / name / "metrics.jsonl") if "loss" in row]


def test_a_last_batch_of_two_trains(run: Commands) -> None:
    """The last 2 of 34 samples are one micro-batch on two ranks, as they are on one."""
    assert len(losses(run, "out", "-n", "2", "samples=34", "record_samples=true")) == 3
    last = [read_lines(run.folder / f"out/samples/rank{rank}.jsonl")[2] for rank in range(2)]
    assert [sum(map(len, row["micro_batches"])) for row in last] == [2, 0]


def test_a_last_batch_of_one_is_the_same_on_any_ranks(run: Commands) -> None:
    """With sync_batchnorm a last batch of one sample gives 3 ranks the losses of 1 rank."""
    one_rank = losses(run, "one", "-n", "1", "samples=33")
    three_ranks = losses(run, "three", "-n", "3", "samples=33", "sync_batchnorm=true")
    assert len(one_rank) == 3
    assert three_ranks == pytest.approx(one_rank, rel=1e-4)


def test_micro_batches_of_two_train(run: Commands) -> None:
    """Two ranks cut 6 samples into 2 + 2 and 2, within micro_batch_size=2, and train."""
    settings = ("samples=36", "batch_size=6", "micro_batch_size=2")
    assert len(losses(run, "out", "-n", "2", *settings)) == 6


@pytest.mark.parametrize(
    "arguments", [("-n", "2", "batch_size=2"), ("-n", "1", "micro_batch_size=1")]
)
def test_full_batches_of_single_samples_are_refused(
    run: Commands, arguments: tuple[str, ...]
) -> None:
    """A run with full batches of single samples is refused before its first step."""
    done = run("launcher", "run", RECIPE, "samples=34", "--out", "out", *arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr
    assert "sync_batchnorm=true" in done.stderr
    assert not losses_of(run.folder / "out")


def losses_of(folder: Path) -> list[float]:
    """Return the losses that the run in `folder` has recorded."""
    path = folder / "metrics.jsonl"
    return [row["loss"] for row in read_lines(path) if "loss" in row] if path.exists() else []


def test_plan_and_check_name_the_batch(run: Commands) -> None:
    """`launcher plan` and `check` name the batch that is cut around single samples."""
    done = run("launcher", "plan", RECIPE, "-n", "2", "samples=34", "--json")
    notes = [note for note in json.loads(done.stdout)["notes"] if "BatchNorm" in note]
    assert any("batch of 2 samples" in note for note in notes)
    done = run("launcher", "plan", RECIPE, "-n", "2", "samples=32", "--json")
    assert "no micro-batch has exactly" not in done.stdout
    done = run("launcher", "check", RECIPE, "samples=34", "--json")
    assert "batch of 2 samples" in done.stdout


@pytest.mark.parametrize("ranks", ["1", "3"])
def test_a_run_resumes_on_other_ranks(run: Commands, ranks: str) -> None:
    """A run whose ranks had different numbers of micro-batches resumes on any number of ranks."""
    losses(run, "out", "-n", "2", "samples=34")
    done = run("launcher", "resume", "out", "-n", ranks, "epochs=2")
    assert done.exit_code == 0, done.stderr
