"""A run with `max_time` on several ranks: repeated to the bit, and resumed on other numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import ROOT, Commands, read_lines, read_weights

from launcher.planning.timed_steps import TimedSteps
from launcher.runs.events import Timed, read_events
from launcher.runs.history import History
from launcher.runs.rundir import RunDir

WORLDS = str(ROOT / "tests/recipes/worlds.py")


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train, repeat and resume all runs."""
    done = module_run("python", ROOT / "tests/timed_ranks.py")
    assert done.exit_code == 0, done.stdout + done.stderr
    return module_run.folder


def timed_steps(folder: Path) -> TimedSteps:
    """Return the steps of a run with `max_time`."""
    steps = History(RunDir(folder)).plan.timed_steps
    assert steps is not None
    return steps


def rates(folder: Path) -> list[float]:
    """Return the learning rate of each step that a run recorded."""
    rows = [row for row in read_lines(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["lr"] for row in rows]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("norms", "norms-again"),
        ("norms", "norms-on1"),
        ("norms", "norms-on3"),
        ("worlds", "worlds-again"),
    ],
)
def test_the_recorded_steps_repeat_a_run_to_the_bit(trained: Path, name: str, other: str) -> None:
    """A repetition, and a resumption on other ranks, take the same steps to the same weights."""
    steps = timed_steps(trained / name)
    assert 2 <= steps.first_step < steps.steps < steps.limit == 10_000
    assert rates(trained / other) == rates(trained / name)
    weights, others = (read_weights(trained / folder) for folder in (name, other))
    assert all(torch.equal(weight, others[key]) for key, weight in weights.items())
    if "again" not in other:
        assert timed_steps(trained / other) == steps
    results = [json.loads((trained / run / "result.json").read_text()) for run in (name, other)]
    assert results[0]["steps"] == results[1]["steps"] == steps.steps
    assert results[0]["evaluation"] == results[1]["evaluation"]


def test_commands_count_from_their_start(run: Commands) -> None:
    """`launcher run` counts its start-up, and `launcher resume` keeps the number of steps."""
    done = run(
        *("launcher", "run", f"{WORLDS}:paced", "-n", "2", "pause=0.02", "epochs=20"),
        *("max_time=40s", "--out", "timed"),
    )
    assert done.exit_code == 0, done.stderr
    assert "at most 100 = 20 epochs x 5 steps, as many as fit in max_time=40s" in done.stdout
    assert "all 100 steps fit in 40s at 0.0" in done.stdout
    folder = run.folder / "timed"
    [event] = [event for event in read_events(RunDir(folder)) if isinstance(event, Timed)]
    measured_for = 0.02 * event.step
    assert event.used_seconds > measured_for + 0.2, "the time before the first step counts"
    result = json.loads((folder / "result.json").read_text())
    assert result["total_seconds"] > result["seconds"] + 0.2
    done = run("launcher", "resume", "timed", "--from", "1", "-n", "1", "pause=0")
    assert done.exit_code == 0, done.stderr
    assert "100, planned for max_time=40s" in done.stdout
    assert timed_steps(folder).first_step == event.step


def test_a_time_that_the_start_uses_up_is_refused(run: Commands) -> None:
    """A recipe's file that Python runs counts from its start too; exit code 2, and no step."""
    done = run("python", WORLDS, "max_time=0.01s", "--out", "over")
    assert done.exit_code == 2
    assert "max_time=0.01s is over before the first step" in done.stderr
    assert not (run.folder / "over/metrics.jsonl").exists()


@pytest.mark.parametrize("setting", ["max_time=30", "max_time=0min", "max_time=00:30:00"])
def test_other_texts_are_refused(run: Commands, setting: str) -> None:
    """A time without a unit, of zero, or of another form is refused with exit code 2."""
    done = run("launcher", "plan", "digits", setting)
    assert done.exit_code == 2
    assert "expected a time such as 90s, 30min or 2h, or none" in done.stderr
