"""A run that is killed at any time can be resumed without loss."""

from __future__ import annotations

from support import ROOT, Commands


def test_killed_at_random(run: Commands) -> None:
    """In 4 trials, SIGKILL of a rank or of all processes, also while saving, loses no step."""
    done = run("python", ROOT / "benchmarks/kill_resume.py", "--trials", "4", timeout=600)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "4 of 4" in done.stdout
