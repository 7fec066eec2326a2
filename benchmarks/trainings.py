"""Cached trainings, for benchmarks that train many times, and the output of finders."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contest import BIN, train

from launcher.runs.files import write_json

AT_THE_END = f"evaluate_every={10**9}"
"""Setting that evaluates only at the end of a training."""


class TrainingResult(NamedTuple):
    """Duration and evaluations of one training."""

    seconds: float
    """Duration of the run."""

    evaluations: list[list[float]]
    """(step, metric) of each evaluation."""


class Trainings:
    """Trains a recipe and caches the results, so that an interrupted benchmark can continue.

    Args:
        recipe: Recipe as the command line names it.
        cache: JSON file with the results, read if it exists; None caches in memory only.
        ranks: Number of processes.
        metric: The metric of evaluations that is kept.
    """

    def __init__(
        self, recipe: str, cache: Path | None, *, ranks: int = 1, metric: str = "accuracy"
    ) -> None:
        self._recipe, self._ranks, self._metric = recipe, ranks, metric
        self._folder = Path(tempfile.mkdtemp(prefix="trainings-"))
        self._cache = cache or self._folder / "results.json"
        values = json.loads(self._cache.read_text()) if self._cache.is_file() else {}
        self._results = {key: TrainingResult(*value) for key, value in values.items()}

    def __enter__(self) -> Trainings:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder)

    def take(self, *settings: str) -> TrainingResult:
        """Return the result of a training with these settings, from the cache if it is there."""
        return self._take(" ".join(settings), settings)

    def again(self, turn: int, *settings: str) -> TrainingResult:
        """Return the result of a training of its own for each turn, to be timed."""
        return self._take(f"turn {turn} of {' '.join(settings)}", settings)

    def _take(self, key: str, settings: Sequence[str]) -> TrainingResult:
        if key not in self._results:
            out = self._folder / str(len(self._results))
            run_dir = train(
                "launcher", self._recipe, out, ranks=self._ranks, settings=settings, options=[]
            )
            rows = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
            self._results[key] = TrainingResult(
                json.loads(run_dir.result.read_text())["seconds"],
                [
                    [row["step"], row["evaluation"][self._metric]]
                    for row in rows
                    if "evaluation" in row
                ],
            )
            write_json(self._cache, self._results)
            shutil.rmtree(out)
        return self._results[key]

    def final(self, steps: int, seeds: Sequence[int], *settings: str) -> list[float]:
        """Return the final metric of a training of `steps` steps for each seed."""
        return [
            self.take(f"steps={steps}", f"seed={seed}", AT_THE_END, *settings).evaluations[-1][1]
            for seed in seeds
        ]


def measure(*command: str, ranks: int = 1) -> dict[str, Any]:
    """Run a finder on some processes with --json and return its decoded output."""
    options = ("-n", str(ranks), "device=cpu", "--json")
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(
            [str(BIN / "launcher"), *command, *options, "--out", f"{folder}/out"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
    output: dict[str, Any] = json.loads(process.stdout)
    return output
