"""What benchmarks that train many times share: trainings that are remembered, and finders."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contest import BIN, train

from launcher.rundir import write_json

_NEVER = 10**9


class Trainings:
    """Trains, and remembers what came of it, so that what was stopped goes on.

    Args:
        recipe: What to train, on one process.
        kept: A file to remember in; None remembers until the end.
    """

    def __init__(self, recipe: str, kept: Path | None) -> None:
        self._recipe = recipe
        self._folder = Path(tempfile.mkdtemp(prefix="trainings-"))
        self._kept = kept or self._folder / "kept.json"
        self._known: dict[str, list[list[float]]] = (
            json.loads(self._kept.read_text()) if self._kept.is_file() else {}
        )

    def __enter__(self) -> Trainings:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder)

    def accuracies(self, *settings: str) -> list[list[float]]:
        """Return (step, accuracy) of each evaluation of a training."""
        key = " ".join(settings)
        if key not in self._known:
            out = self._folder / str(len(self._known))
            run_dir = train("launcher", self._recipe, out, ranks=1, settings=settings, options=[])
            rows = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
            self._known[key] = [
                [row["step"], row["evaluation"]["accuracy"]] for row in rows if "evaluation" in row
            ]
            write_json(self._kept, self._known)
            shutil.rmtree(out)
        return self._known[key]

    def final(self, steps: int, seeds: Sequence[int], *settings: str) -> list[float]:
        """Return the accuracy at the end of a training of so many steps, for each seed."""
        only_last = f"evaluate_every={_NEVER}"
        return [
            self.accuracies(f"steps={steps}", f"seed={seed}", only_last, *settings)[-1][1]
            for seed in seeds
        ]


def measure(*command: str) -> dict[str, Any]:
    """Run a finder on one process, with --json, and return what it printed."""
    options = ("-n", "1", "device=cpu", "--json")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(BIN / "launcher"), *command, *options, "--out", f"{folder}/out"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found
