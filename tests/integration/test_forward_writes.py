"""Tests that buffers and weights written in forward are equal on all ranks, or are refused."""

from __future__ import annotations

import json

import pytest
import torch
from support import ROOT, Commands, read_weights

WRITING = f"{ROOT / 'tests/recipes/writing.py'}:writing"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["model=mean"], "mean"),
        (["model=mean", "strategy=fsdp"], "mean"),
        (["model=mean", "strategy=zero3"], "mean"),
        (["model=queue", "rank_buffers=average"], "last"),
        (["model=codebook"], "codes"),
        (["model=max_norm"], "words.weight"),
        (["model=max_norm", "strategy=fsdp"], "words.weight"),
        (["model=max_norm", "strategy=zero3"], "words.weight"),
        (["model=teacher", "strategy=fsdp"], "teacher.bias"),
    ],
)
def test_writes_that_differ_between_ranks_are_refused(
    run: Commands, settings: list[str], named: str
) -> None:
    """A run whose ranks write different values fails before step 1 and names the tensor."""
    done = run("launcher", "run", WRITING, "-n", "2", "-q", "--out", "out", *settings)
    assert done.exit_code == 2, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run.folder / "out/checkpoints").exists()


@pytest.mark.parametrize(("strategy", "exit_code"), [("ddp", 1), ("fsdp", 2)])
def test_writes_to_the_data_of_weights_are_refused(
    run: Commands, strategy: str, exit_code: int
) -> None:
    """A write through `.data`, which no version counter shows, is detected by step 2."""
    done = run(
        *("launcher", "run", WRITING, "-n", "2", "-q", "--out", "out", "model=clamped"),
        f"strategy={strategy}",
    )
    assert done.exit_code == exit_code, done.stderr
    assert "0.weight" in done.stderr
    assert not (run.folder / "out/checkpoints").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ["model=equal"],
        ["model=equal", "strategy=zero3"],
        ["model=teacher"],
        ["model=teacher", "strategy=zero2"],
        ["model=queue", "rank_buffers=broadcast"],
    ],
)
def test_writes_that_are_equal_on_all_ranks_are_accepted(
    run: Commands, settings: list[str]
) -> None:
    """Counters, spectral norms, teachers and synchronised buffers do not stop a run."""
    done = run("launcher", "run", WRITING, "-n", "2", "-q", "--out", "out", *settings)
    assert done.exit_code == 0, done.stderr


def test_broadcast_buffers_are_exact(run: Commands) -> None:
    """rank_buffers=broadcast keeps infinities and integers above 2**53 of rank 0 exact."""
    done = run(
        *("launcher", "run", WRITING, "-n", "2", "-q", "--out", "out", "model=minima"),
        "rank_buffers=broadcast",
    )
    assert done.exit_code == 0, done.stderr
    weights = read_weights(run.folder / "out")
    assert weights["least"][8] == torch.inf
    assert not weights["least"].isnan().any()
    assert weights["largest"].abs() > 2**53


def test_averaged_buffers_equal_those_of_one_rank(run: Commands) -> None:
    """With rank_buffers=average, a running mean on two ranks equals that on one rank."""
    arguments = ("launcher", "run", WRITING, "-q", "rank_buffers=average")
    for ranks in ("1", "2"):
        done = run(*arguments, "-n", ranks, "--out", f"on{ranks}")
        assert done.exit_code == 0, done.stderr
    one, two = (read_weights(run.folder / f"on{ranks}") for ranks in (1, 2))
    assert one["mean"].abs().max() > 0
    torch.testing.assert_close(one["mean"], two["mean"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("model", "check", "named"), [("mean", "buffers", "mean"), ("max_norm", "weights", "words")]
)
def test_check_names_written_tensors(run: Commands, model: str, check: str, named: str) -> None:
    """`launcher check` warns of a written tensor by name, and does not report randomness."""
    done = run("launcher", "check", WRITING, f"model={model}", "--json")
    assert done.exit_code == 0, done.stderr
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings[check]["level"] == "warning"
    assert named in findings[check]["found"]
    assert "randomness" not in findings


def test_prove_names_a_written_buffer(run: Commands) -> None:
    """`launcher prove` names a written buffer as the cause of different steps."""
    done = run(
        *("launcher", "prove", WRITING, "model=mean", "rank_buffers=broadcast", "--steps", "3"),
        *("--worlds", "1,2", "--strategies", "ddp"),
    )
    assert done.exit_code == 1, done.stderr
    assert "mean" in done.stdout
