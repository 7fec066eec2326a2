"""What the README promises beyond its blocks, which test_docs.py runs."""

from __future__ import annotations

import re
import subprocess
import sys

from support import ROOT, Commands


def test_the_readme_stays_short() -> None:
    """The README has at most 200 lines; everything else is in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_default_recipe_learns(run: Commands) -> None:
    """Digits reaches the promised accuracy on data that it has not seen."""
    done = run("launcher", "run", "digits", "-n", "2", "seed=1")
    accuracy = float(re.findall(r"held-out: accuracy (\S+)", done.stdout)[-1])
    assert accuracy >= 0.97


def test_make_test_is_what_it_says() -> None:
    """`make test` runs lint, formatting, types and tests, in this order."""
    shown = subprocess.run(
        ["make", "-n", "test", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.ready"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    order = [shown.index(word) for word in ("ruff check", "ruff format --check", "mypy", "pytest")]
    assert order == sorted(order)
