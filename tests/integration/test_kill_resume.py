"""Nothing is lost by a kill, whatever it ends and whenever it comes."""

from __future__ import annotations

import sys

from support import ROOT, Commands


def test_killed_at_random(run: Commands) -> None:
    """SIGKILL of a rank or of everything, while saving too, loses nothing: 20 times."""
    done = run(sys.executable, ROOT / "benchmarks/kill_resume.py", "--trials", "20", timeout=600)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "20 of 20" in done.stdout
