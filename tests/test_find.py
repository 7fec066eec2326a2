"""`launcher find`: real trainings on real ranks, and what they say."""

from __future__ import annotations

import json
import math

import pytest
from support import Commands

LR = ("launcher", "find", "lr", "digits", "--from", "1e-4", "--steps", "60")


@pytest.fixture(scope="module")
def alone(module_run: Commands) -> dict[str, object]:
    """Return what one process finds."""
    done = module_run(*LR, "-n", "1", "--json", "--out", "alone")
    assert done.exit_code == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_lr_is_found(run: Commands) -> None:
    """It draws the curve, names the rules, prints the lines to paste and leaves an image."""
    done = run(*LR, "-n", "2", "--out", "out")
    assert done.exit_code == 0, done.stderr
    for rule in ("valley", "steep", "minimum", "slide"):
        assert f"\n  {rule}" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("lr: "))
    assert 0.01 < float(line.split()[1]) < 1
    assert "# launcher find lr, valley: " in line
    assert (run.folder / "out/lr.png").read_bytes().startswith(b"\x89PNG")
    (run.folder / "found.yaml").write_text(line)
    taken = run("launcher", "plan", "digits", "--config", "found.yaml")
    assert taken.exit_code == 0, "the line is one that --config takes"
    assert f"lr={float(line.split()[1])}" in taken.stdout


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_the_curve_is_that_of_one_process(
    run: Commands, alone: dict[str, object], strategy: str
) -> None:
    """Two ranks see the losses of one under every strategy, and suggest the same."""
    done = run(*LR, "-n", "2", f"strategy={strategy}", "--json", "--out", "out")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    wanted = json.loads(json.dumps(alone))
    assert found["curve"]["lrs"] == pytest.approx(wanted["curve"]["lrs"])
    before = 35  # rounding grows where the loss is about to break
    assert found["curve"]["losses"][:before] == pytest.approx(
        wanted["curve"]["losses"][:before], rel=1e-4
    )
    assert found["settings"]["lr"] == pytest.approx(wanted["settings"]["lr"], rel=0.1)


def test_the_suggestion_is_stated_at_the_recipes_batch(run: Commands) -> None:
    """At twice the batch of the recipe the line to paste has half of what was found."""
    done = run(*LR, "-n", "1", "batch_size=256", "--json", "--out", "out")
    found = json.loads(done.stdout)
    assert found["batch_size"] == 256
    assert found["settings"] == {"lr": pytest.approx(found["suggestions"]["valley"] / 2)}


def test_a_range_that_breaks_stops_early(run: Commands) -> None:
    """A loss that is not finite ends the test on all ranks; what came before it counts."""
    command = ("launcher", "find", "lr", "digits", "--from", "0.01", "--to", "1e6", "--steps")
    done = run(*command, "400", "-n", "2", "max_grad_norm=none", "--json", "--out", "out")
    found = json.loads(done.stdout)
    assert len(found["curve"]["losses"]) < 400
    assert all(map(math.isfinite, found["curve"]["losses"]))
    assert done.exit_code == 0, done.stderr


def test_nothing_to_suggest_is_said(run: Commands) -> None:
    """Where the loss never falls there is no line to paste, a reason, and exit code 1."""
    command = ("launcher", "find", "lr", "digits", "--from", "1e-9", "--to", "1e-8", "--steps")
    done = run(*command, "20", "-n", "1", "--out", "out")
    assert done.exit_code == 1
    assert "No learning rate is suggested: the loss does not fall at any learning rate" in (
        done.stdout
    )
    assert "lr: " not in done.stdout


def test_a_range_has_to_rise(run: Commands) -> None:
    """A range that falls is refused before anything starts."""
    done = run("launcher", "find", "lr", "digits", "--from", "1", "--to", "0.1")
    assert done.exit_code == 2
    assert "the learning rate has to rise" in done.stderr
    assert not list(run.folder.iterdir())
