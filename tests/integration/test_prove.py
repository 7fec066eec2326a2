"""`launcher prove`: it agrees where the steps are the same, and says why where they are not."""

from __future__ import annotations

import json

import pytest
from support import ROOT, Commands

WORLDS = str(ROOT / "tests/recipes/worlds.py")
SPLITS = str(ROOT / "tests/recipes/splits.py")
TWO = ("--worlds", "1,2", "--strategies", "ddp", "--steps", "4")


def test_the_same_steps_are_proved(run: Commands) -> None:
    """A line per configuration, equal but for rounding; exit code 0 and nothing left behind."""
    done = run(
        *("launcher", "prove", f"{WORLDS}:worlds", "--worlds", "2,1,2"),
        *("--strategies", "ddp,fsdp,zero2", "--steps", "3", "micro_batch_size=20"),
    )
    assert done.exit_code == 0, done.stderr
    head, columns, first, *others = done.stdout.splitlines()[:8]
    assert head == "worlds: 3 of 15 steps"
    assert columns.split()[:2] == ["strategy", "ranks"]
    assert first.split()[:3] == ["ddp", "1", "4"]
    found = [line.split() for line in others[:4]]
    assert [line[:3] for line in found] == [
        ["zero2", "1", "4"],
        ["ddp", "2", "2"],
        ["fsdp", "2", "2"],
        ["zero2", "2", "2"],
    ]
    for line in found:
        assert line[3:6] == ["=", "=", "="], "sample ids, learning rates, item counts"
        for value in line[6:]:
            assert value == "=" or float(value) <= 1e-5
    assert "The same 3 steps in all 5 configurations" in done.stdout
    assert list((run.folder / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "cause"),
    [
        ("batch_norm", "cause: BatchNorm (1.0.norm and 1 more): its statistics are over the micro"),
        ("dropout", "cause: Dropout or other randomness in the model (1): each rank draws its own"),
        ("mean", "cause: The loss returns a mean"),
        ("unseeded", "cause: Unseeded randomness in the data set: training sample 0, 1, 2, 3, 4"),
    ],
)
def test_causes_are_named(run: Commands, recipe: str, cause: str) -> None:
    """Each way in which a recipe can depend on the ranks is told, with the first step."""
    done = run("launcher", "prove", f"{SPLITS}:{recipe}", *TWO, "--out", "kept")
    assert done.exit_code == 1, done.stderr
    assert "ddp on 2: losses or gradient norms differ by more than 1e-05 from step 1" in done.stdout
    causes = [line for line in done.stdout.splitlines() if line.startswith("cause: ")]
    assert len(causes) == 1, "and no other"
    assert causes[0].startswith(cause)
    assert (run.folder / "kept/ddp-2/metrics.jsonl").is_file()


def test_what_helps_is_true(run: Commands) -> None:
    """The remedy that is named for BatchNorm makes the steps the same."""
    done = run("launcher", "prove", f"{SPLITS}:batch_norm", *TWO, "sync_batchnorm=true", "--json")
    assert done.exit_code == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["agree"]
    assert found["causes"] == []
    alone, together = found["rows"]
    assert (alone["strategy"], alone["ranks"]) == ("ddp", 1)
    assert "loss" not in alone
    assert together["unequal"] == {}
    assert 0 < together["weights"] <= together["tolerance"] == 1e-5


def test_trials_are_not_published(run: Commands) -> None:
    """A recipe with experiment trackers is proved without them, in the plans and on the ranks."""
    done = run(
        *("launcher", "prove", f"{WORLDS}:worlds", "--worlds", "1", "--strategies", "ddp"),
        *("--steps", "1", "trackers=tensorboard", "--out", "kept"),
    )
    assert done.exit_code == 0, done.stderr
    kept = {path.name for path in (run.folder / "kept/ddp-1").rglob("*")}
    assert "metrics.jsonl" in kept
    assert not [name for name in kept if "tfevents" in name or name == "tensorboard"]


def test_rounding_is_no_cause(run: Commands) -> None:
    """Where nothing is wrong but the tolerance, it says so rather than naming something."""
    done = run("launcher", "prove", f"{WORLDS}:worlds", *TWO, "--tolerance", "0")
    assert done.exit_code == 1
    assert "cause:" not in done.stdout
    assert "No cause was found in the data, the loss or the model. Rounding grows" in done.stdout


def test_a_run_that_fails_is_no_proof(run: Commands) -> None:
    """The failure is shown as that of any run, and the others are not run."""
    recipe = str(ROOT / "tests/recipes/failing.py")
    done = run("launcher", "prove", recipe, *TWO, "how=raise")
    assert done.exit_code == 1
    assert "failed with exit code 1" in done.stdout
    assert "Traceback" in done.stderr
    assert not any(line.startswith("ddp         2") for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--worlds", "two"], "--worlds: expected whole numbers of at least 1, found 'two'"),
        (["--worlds", "1,0"], "--worlds: expected whole numbers of at least 1, found '0'"),
        (["--strategies", "ddp,zero9"], "strategy=zero9 (launcher prove): expected ddp or fsdp"),
        (["--worlds", "1", "--strategies", "fsdp"], "strategy=fsdp needs 2 ranks or more"),
        (["batch_size_per_gpu=8"], "Give batch_size=8."),
        (["offload=cpu", "--strategies", "ddp"], "offload=cpu moves what a strategy shards"),
        (["strategy=zero2"], "strategy=zero2 (command line): what is compared is said by --strat"),
        (["--worlds", ""], "'--worlds': expected values with commas between them, found none"),
        (["--strategies", ","], "'--strategies': expected values with commas between them"),
    ],
)
def test_what_cannot_be_proved_is_refused(
    run: Commands, arguments: list[str], message: str
) -> None:
    """One sentence before anything is started, and no folder."""
    done = run("launcher", "prove", f"{WORLDS}:worlds", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    runs = run.folder / "runs"
    assert not runs.exists() or list(runs.iterdir()) == []
