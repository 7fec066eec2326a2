"""What forward writes is the same on every rank, or the run is refused by name before step 1."""

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
def test_what_differs_between_ranks_is_refused(
    run: Commands, settings: list[str], named: str
) -> None:
    """The first step is not taken, and the buffer or the weight is named."""
    done = run("launcher", "run", WRITING, "-n", "2", "-q", "--out", "out", *settings)
    assert done.exit_code == 2, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run.folder / "out/checkpoints").exists()


@pytest.mark.parametrize(("strategy", "exit_code"), [("ddp", 1), ("fsdp", 2)])
def test_writes_to_the_data_of_weights_are_refused(
    run: Commands, strategy: str, exit_code: int
) -> None:
    """What no version counter shows is found when it changes a bit, at the latest in step 2."""
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
def test_what_is_the_same_on_all_ranks_is_trained(run: Commands, settings: list[str]) -> None:
    """Counters, spectral norms, teachers and what is brought together go their way."""
    done = run("launcher", "run", WRITING, "-n", "2", "-q", "--out", "out", *settings)
    assert done.exit_code == 0, done.stderr


def test_broadcast_buffers_are_those_of_the_first_rank(run: Commands) -> None:
    """Infinities and large whole numbers of rank 0 reach all ranks as they are."""
    done = run(
        *("launcher", "run", WRITING, "-n", "2", "-q", "--out", "out", "model=minima"),
        "rank_buffers=broadcast",
    )
    assert done.exit_code == 0, done.stderr
    found = read_weights(run.folder / "out")
    assert found["least"][8] == torch.inf
    assert not found["least"].isnan().any()
    assert found["largest"].abs() > 2**53


def test_averaged_buffers_are_those_of_one_rank(run: Commands) -> None:
    """The mean of the ranks' running means is the running mean of the whole batch."""
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
def test_check_names_it(run: Commands, model: str, check: str, named: str) -> None:
    """`launcher check` warns of it, and does not take it for randomness."""
    done = run("launcher", "check", WRITING, f"model={model}", "--json")
    assert done.exit_code == 0, done.stderr
    findings = {each["check"]: each for each in json.loads(done.stdout)["findings"]}
    assert findings[check]["level"] == "warning"
    assert named in findings[check]["found"]
    assert "randomness" not in findings


def test_prove_names_it(run: Commands) -> None:
    """`launcher prove` gives the buffer as a cause where the steps differ."""
    done = run(
        *("launcher", "prove", WRITING, "model=mean", "rank_buffers=broadcast", "--steps", "3"),
        *("--worlds", "1,2", "--strategies", "ddp"),
    )
    assert done.exit_code == 1, done.stderr
    assert "mean" in done.stdout
