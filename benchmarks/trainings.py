"""What benchmarks that train many times share: trainings that are remembered, and finders."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contest import BIN, train

from launcher.runs.rundir import write_json

AT_THE_END = f"evaluate_every={10**9}"
"""The setting that evaluates there alone."""


class Took(NamedTuple):
    """What a training took and came to."""

    seconds: float
    evaluations: list[list[float]]
    """(step, accuracy) of each."""


class Trainings:
    """Trains, and remembers what came of it, so that what was stopped goes on.

    Args:
        recipe: What to train.
        kept: A file to remember in; None remembers until the end.
        ranks: Processes.
    """

    def __init__(self, recipe: str, kept: Path | None, *, ranks: int = 1) -> None:
        self._recipe, self._ranks = recipe, ranks
        self._folder = Path(tempfile.mkdtemp(prefix="trainings-"))
        self._kept = kept or self._folder / "kept.json"
        known = json.loads(self._kept.read_text()) if self._kept.is_file() else {}
        self._known = {key: Took(*took) for key, took in known.items()}

    def __enter__(self) -> Trainings:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder)

    def take(self, *settings: str) -> Took:
        """Train with these settings, unless that was done."""
        key = " ".join(settings)
        if key not in self._known:
            out = self._folder / str(len(self._known))
            run_dir = train(
                "launcher", self._recipe, out, ranks=self._ranks, settings=settings, options=[]
            )
            rows = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
            self._known[key] = Took(
                json.loads(run_dir.result.read_text())["seconds"],
                [
                    [row["step"], row["evaluation"]["accuracy"]]
                    for row in rows
                    if "evaluation" in row
                ],
            )
            write_json(self._kept, self._known)
            shutil.rmtree(out)
        return self._known[key]

    def final(self, steps: int, seeds: Sequence[int], *settings: str) -> list[float]:
        """Return the accuracy at the end of a training of so many steps, for each seed."""
        return [
            self.take(f"steps={steps}", f"seed={seed}", AT_THE_END, *settings).evaluations[-1][1]
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
