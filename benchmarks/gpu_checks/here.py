"""Training with launcher in this process, which the measurements in it need."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from launcher import Recipe, make_plan, read_machine
from launcher.engine.backends.local import LocalBackend
from launcher.engine.ranks.output import Output
from launcher.engine.run import train_rank
from launcher.planning.plan import Plan
from launcher.runs.rundir import RunDir


def plan_of(recipe: Recipe) -> Plan:
    """Return the plan of a recipe for this process alone."""
    return make_plan(recipe, read_machine(), nproc_per_node=1)


def train(recipe: Recipe, backend: LocalBackend, folder: Path) -> list[dict[str, Any]]:
    """Train in this process, and return the lines of the steps."""
    # Standard output is for the result of the measurement.
    output = Output(terminal=io.StringIO(), errors=sys.stderr, log=io.StringIO())
    train_rank(recipe, backend.plan, backend, RunDir(folder), output)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]
