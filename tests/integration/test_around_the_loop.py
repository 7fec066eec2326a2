"""Callbacks on several ranks, under every kind of strategy, and after a resume."""

from __future__ import annotations

import json

from support import ROOT, Commands

WATCHED = ROOT / "tests/recipes/watched.py"


def test_a_callback_that_raises_is_named_and_its_run_resumes(run: Commands) -> None:
    """The callback, hook, step and rank are shown; other ranks and strategies resume with state."""
    options = ("-q", "--out", "out", "steps=9", "evaluate_every=5", "strategy=fsdp")
    done = run("launcher", "run", WATCHED, "-n", "2", *options, "fails=on_evaluation")
    assert done.exit_code == 1, done.stdout
    assert "ValueError: enough seen" in done.stderr
    [note] = [line for line in done.stderr.splitlines() if line.startswith("launcher: The")]
    for word in ("Diary", "on_evaluation", "step 5", "rank 1"):
        assert word in note
    failure = json.loads((run.folder / "out/failure.json").read_text())
    assert (failure["rank"], failure["error"]) == (1, "ValueError")
    assert note in failure["message"]
    done = run("launcher", "resume", "out", "-n", "3", "-q", "fails=", "strategy=ddp")
    assert done.exit_code == 0, done.stderr
    result = json.loads((run.folder / "out/result.json").read_text())
    diaries = [(run.folder / f"out/diary{rank}.txt").read_text() for rank in range(3)]
    assert diaries == [f"{[*range(1, 10)]} {result['evaluation']['accuracy']} 5210\n"] * 3
