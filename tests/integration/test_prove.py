"""`launcher prove` confirms equal steps and names the cause of different ones."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable

import pytest
from support import ROOT, Commands, fail_on_leftovers, has_rows, wait_until

from launcher.runs.rundir import RunDir

WORLDS = str(ROOT / "tests/recipes/worlds.py")
SPLITS = str(ROOT / "tests/recipes/splits.py")
TWO_WORLDS = ("--worlds", "1,2", "--strategies", "ddp", "--steps", "4")


def test_equal_steps_are_confirmed(run: Commands) -> None:
    """Equal steps give a row per configuration, exit code 0 and no run folder."""
    done = run(
        *("launcher", "prove", f"{WORLDS}:worlds", "--worlds", "2,1,2"),
        *("--strategies", "ddp,fsdp,zero2", "--steps", "3", "micro_batch_size=20"),
        "evaluate_every=2",
    )
    assert done.exit_code == 0, done.stderr
    head, columns, first, *others = done.stdout.splitlines()[:8]
    assert head == "worlds: 3 of 15 steps"
    assert columns.split()[:2] == ["strategy", "ranks"]
    assert first.split()[:3] == ["ddp", "1", "4"]
    rows = [line.split() for line in others[:4]]
    assert [row[:3] for row in rows] == [
        ["zero2", "1", "4"],
        ["ddp", "2", "2"],
        ["fsdp", "2", "2"],
        ["zero2", "2", "2"],
    ]
    for row in rows:
        assert row[3:6] == ["=", "=", "="], "sample ids, learning rates, item counts"
        assert len(row) == 10, "the last cell is of evaluations"
        for value in row[6:]:
            assert value == "=" or float(value) <= 1e-5
    assert "3 steps in all 5 configurations" in done.stdout
    assert list((run.folder / "runs").iterdir()) == []


def test_weights_that_a_callback_freezes_stay(run: Commands) -> None:
    """Weights that are frozen for some steps take the same steps; ZeRO, which cannot, says so."""
    recipe = f"{ROOT / 'tests/recipes/partly_frozen.py'}:frozen_for_a_while"
    options = ("--strategies", "ddp,fsdp,zero1", "--steps", "6")
    done = run("launcher", "prove", recipe, "--worlds", "1,2", *options, "--out", "kept")
    rows = {tuple(line.split()[:2]): line.split() for line in done.stdout.splitlines()}
    for strategy in ("ddp", "fsdp"):
        assert all(value == "=" or float(value) <= 1e-5 for value in rows[strategy, "2"][3:9])
    for ranks in ("1", "2"):
        assert "failed" in rows["zero1", ranks]
    assert "FreezesFirstLayer" in done.stderr
    assert "strategy=zero1" in done.stderr


@pytest.mark.parametrize(
    ("recipe", "cause"),
    [
        ("batch_norm", r"cause: BatchNorm \(1\.0\.norm and 1 more\).* sync_batchnorm=true"),
        ("dropout", r"cause: Dropout \(1\)"),
        ("mean", r"cause: The loss returns a mean.* reduction='sum'"),
        ("unseeded", r"cause: Unseeded randomness .* 0, 1, 2, 3, 4"),
    ],
)
def test_the_cause_is_named(run: Commands, recipe: str, cause: str) -> None:
    """A recipe whose steps depend on the ranks gives one cause and the first step that differs."""
    done = run("launcher", "prove", f"{SPLITS}:{recipe}", *TWO_WORLDS, "--out", "kept")
    assert done.exit_code == 1, done.stderr
    assert re.search(r"^ddp on 2: .* 1e-05 from step 1$", done.stdout, re.MULTILINE)
    causes = [line for line in done.stdout.splitlines() if line.startswith("cause: ")]
    assert len(causes) == 1
    assert re.match(cause, causes[0])
    assert (run.folder / "kept/ddp-2/metrics.jsonl").is_file()


def test_the_remedy_works(run: Commands) -> None:
    """With sync_batchnorm=true, the remedy for BatchNorm, the steps are equal."""
    done = run(
        "launcher", "prove", f"{SPLITS}:batch_norm", *TWO_WORLDS, "sync_batchnorm=true", "--json"
    )
    assert done.exit_code == 0, done.stdout + done.stderr
    output = json.loads(done.stdout)
    assert output["agree"]
    assert output["causes"] == []
    reference, two_ranks = output["rows"]
    assert (reference["strategy"], reference["ranks"]) == ("ddp", 1)
    assert "loss" not in reference
    assert two_ranks["unequal"] == {}
    assert 0 < two_ranks["weights"] <= two_ranks["tolerance"] == 1e-5


def test_trials_are_not_published(run: Commands) -> None:
    """A recipe with experiment trackers is proved without them, in the plans and on the ranks."""
    done = run(
        *("launcher", "prove", f"{WORLDS}:worlds", "--worlds", "1", "--strategies", "ddp"),
        *("--steps", "1", "trackers=tensorboard", "--out", "kept"),
    )
    assert done.exit_code == 0, done.stderr
    names = {path.name for path in (run.folder / "kept/ddp-1").rglob("*")}
    assert "metrics.jsonl" in names
    assert not [name for name in names if "tfevents" in name or name == "tensorboard"]


def test_rounding_has_no_cause(run: Commands) -> None:
    """Differences by rounding alone name no cause and suggest fewer steps or fp64."""
    done = run("launcher", "prove", f"{WORLDS}:worlds", *TWO_WORLDS, "--tolerance", "0")
    assert done.exit_code == 1
    assert "cause:" not in done.stdout
    assert "precision=fp64" in done.stdout


def test_a_failed_reference_ends_the_comparison(run: Commands) -> None:
    """If the reference fails, its failure is shown and the other configurations do not run."""
    recipe = str(ROOT / "tests/recipes/failing.py")
    done = run("launcher", "prove", recipe, *TWO_WORLDS, "how=raise")
    assert done.exit_code == 1
    assert "exit code 1" in done.stdout
    assert "Traceback" in done.stderr
    assert not any(line.startswith("ddp         2") for line in done.stdout.splitlines())


def test_a_failure_ends_its_own_configuration(run: Commands) -> None:
    """If a rank fails in one configuration, its failure is shown and the others are compared."""
    recipe = str(ROOT / "tests/recipes/failing.py")
    done = run(
        *("launcher", "prove", recipe, "--worlds", "1,2,3", "--strategies", "ddp", "--json"),
        *("--steps", "3", "how=raise", "rank=2"),
    )
    assert done.exit_code == 1
    rows = json.loads(done.stdout)["rows"]
    assert [(row["ranks"], row["exit_code"]) for row in rows] == [(1, 0), (2, 0), (3, 1)]
    assert rows[1]["unequal"] == {}
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("number", "kill", "exit_code"),
    [
        (signal.SIGINT, os.killpg, 130),
        (signal.SIGQUIT, os.killpg, 131),
        (signal.SIGKILL, os.kill, -signal.SIGKILL),
    ],
)
def test_a_signal_ends_configurations_beside_each_other(
    run: Commands, number: signal.Signals, kill: Callable[[int, int], None], exit_code: int
) -> None:
    """A signal ends all ranks and what started them at once, and leaves no temporary folder."""
    (run.folder / "temporary").mkdir()
    process = run.start(
        *("launcher", "prove", f"{WORLDS}:paced", "--worlds", "1,2,3", "--strategies", "ddp"),
        *("--steps", "10", "pause=0.1", "--out", "kept"),
        env={"TMPDIR": str(run.folder / "temporary")},
    )
    runs = [RunDir(run.folder / "kept" / name) for name in ("ddp-2", "ddp-3")]
    wait_until(lambda: all(has_rows(each, 1) for each in runs), process)
    kill(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code
    if number is not signal.SIGKILL:
        assert stderr.strip() == f"launcher: stopped by {number.name}"
    fail_on_leftovers(run.mark)
    assert [path.name for path in (run.folder / "temporary").glob("launcher-*")] == []


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--worlds", "two"], "'two'"),
        (["--worlds", "1,0"], "'0'"),
        (["--strategies", "ddp,zero9"], "strategy=zero9"),
        (["--worlds", "1", "--strategies", "fsdp"], "strategy=fsdp needs 2 ranks"),
        (["batch_size_per_gpu=8"], "batch_size=8 "),
        (["offload=cpu", "--strategies", "ddp"], "offload=cpu"),
        (["strategy=zero2"], "--strategies zero2"),
        (["--worlds", ""], "--worlds"),
        (["--strategies", ","], "--strategies"),
    ],
)
def test_an_impossible_comparison_is_refused(
    run: Commands, arguments: list[str], fragment: str
) -> None:
    """An impossible comparison gives exit code 2 without traceback, and no run folder."""
    done = run("launcher", "prove", f"{WORLDS}:worlds", *arguments)
    assert done.exit_code == 2
    assert fragment in done.stderr
    assert "Traceback" not in done.stderr
    runs = run.folder / "runs"
    assert not runs.exists() or list(runs.iterdir()) == []
