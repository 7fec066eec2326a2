"""A run that is killed at any time can be resumed without loss."""

from __future__ import annotations

import sys

from support import ROOT, Commands


def test_killed_at_random(run: Commands) -> None:
    """In 10 trials, SIGKILL of a rank or of all processes, also while saving, loses no step."""
    done = run(sys.executable, ROOT / "benchmarks/kill_resume.py", "--trials", "10", timeout=600)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "10 of 10" in done.stdout
