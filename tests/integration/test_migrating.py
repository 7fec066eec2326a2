"""The files of docs/migrating: each script and the recipe that replaces it, with equal losses."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from migrating import MIGRATIONS
from support import ROOT, Commands, read_lines

FILES = ROOT / "docs/migrating"
SAME_ORDER = ROOT / "benchmarks/same_order.py"
MODULES = {"lightning": "lightning", "trainer": "transformers"}
"""What a script imports beyond what the tests need."""


def test_the_page_shows_the_files() -> None:
    """Each file is shown whole on the page, and each block with a name is one of them."""
    page = (ROOT / "docs/migrating.md").read_text()
    shown = dict(
        re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', page, re.DOTALL | re.MULTILINE)
    )
    assert shown == {path.name: path.read_text() for path in FILES.glob("*.py")}


def losses_of(run_dir: Path) -> list[float]:
    """Return the loss of each step of a run."""
    return [row["loss"] for row in read_lines(run_dir / "metrics.jsonl") if "lr" in row]


@pytest.mark.parametrize("after", ["mine.py", "like_trainer.py"])
def test_recipes_take_the_steps_of_the_scripts(
    module_run: Commands, free_port: int, after: str
) -> None:
    """On one process, with one order of samples, each loss of a script is that of its recipe."""
    run = module_run
    trained = run.folder / after
    done = run("launcher", "run", FILES / after, "-n", "1", "--out", trained, "-q")
    assert done.exit_code == 0, done.stderr
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    environment = {**world, "MASTER_PORT": str(free_port), "ACCELERATE_USE_CPU": "true"}
    compared = 0
    for name, migration in MIGRATIONS.items():
        is_missing = name in MODULES and importlib.util.find_spec(MODULES[name]) is None
        # Lightning's script starts two processes; benchmarks/migrating.py runs it.
        if migration.after != after or migration.starts_ranks or is_missing:
            continue
        file = run.folder / f"{name}.json"
        done = run("python", SAME_ORDER, FILES / migration.before, file, env=environment)
        assert done.exit_code == 0, done.stderr
        losses = json.loads(file.with_name(f"{file.name}.0").read_text())
        assert len(losses) == 60
        assert losses == pytest.approx(losses_of(trained), rel=2e-6)
        compared += 1
    assert compared == (2 if after == "mine.py" else 1)
