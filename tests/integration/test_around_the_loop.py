"""Callbacks and logged numbers on several ranks, and after a resume on others."""

from __future__ import annotations

import json

import pytest
from support import ROOT, Commands, read_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.console.watch_screen import status_values
from launcher.runs.history import History
from launcher.runs.rundir import RunDir

WATCHED = ROOT / "tests/recipes/watched.py"


def test_a_callback_that_raises_is_named_and_its_run_resumes(run: Commands) -> None:
    """The callback, hook, step and rank are shown; other ranks and strategies resume with state."""
    options = ("--json", "--out", "out", "steps=9", "evaluate_every=5", "strategy=fsdp")
    done = run("launcher", "run", WATCHED, "-n", "2", *options, "fails=on_evaluation")
    assert done.exit_code == 1, done.stdout
    events = [json.loads(line) for line in done.stdout.splitlines()]
    [first, *_] = [event for event in events if event["event"] == "stepped"]
    assert first["train/again"] == pytest.approx(first["loss"])
    assert "ValueError: enough seen" in done.stderr
    [note] = [line for line in done.stderr.splitlines() if line.startswith("launcher: The")]
    for word in ("Diary", "on_evaluation", "step 5", "rank 1"):
        assert word in note
    failure = json.loads((run.folder / "out/failure.json").read_text())
    assert (failure["rank"], failure["error"]) == (1, "ValueError")
    assert note in failure["message"]
    changes = "fails=", "strategy=ddp", "trackers=tensorboard"
    done = run("launcher", "resume", "out", "-n", "3", *changes)
    assert done.exit_code == 0, done.stderr
    assert "  again 2." in done.stdout
    result = json.loads((run.folder / "out/result.json").read_text())
    diaries = [(run.folder / f"out/diary{rank}.txt").read_text() for rank in range(3)]
    assert diaries == [f"{[*range(1, 10)]} {result['evaluation']['accuracy']} 5210\n"] * 3
    history = History(RunDir(run.folder / "out"))
    rows = [row for row in read_lines(run.folder / "out/metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert history.logged["again"] == [(row["step"], row["train/again"]) for row in rows]
    assert status_values(history, history.state)["latest"]["train/three"] == 3.0
    events_file = EventAccumulator(str(run.folder / "out/tensorboard")).Reload()
    for own, other in zip(*map(events_file.Scalars, ("train/again", "train/loss")), strict=True):
        assert (own.step, own.value) == (other.step, pytest.approx(other.value))
    assert run("launcher", "report", "out").exit_code == 0
    assert "digit/7" in (run.folder / "out/report.html").read_text()
