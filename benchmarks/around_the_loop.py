"""Compare what happens around the training loop on 1, 2 and 3 processes, under three strategies.

    python benchmarks/around_the_loop.py

Claim: logged numbers, metrics over all predictions, averaged weights, the best checkpoint, an early
end and predictions do not depend on the number of processes and on the strategy, also after a
resume in the middle. One recipe has all of them. Each row is compared with one process under ddp:

    logged       numbers that the loss logs, and the training metric, largest relative difference
    metrics      of two evaluation sets, largest relative difference
    AUROC        of torchmetrics, largest difference from scikit-learn's over the whole set
    average      of the weights, as it is exported, relative to the largest weight of a tensor
    best, end    steps of the best checkpoint and of the early end
    predictions  whether the file of predictions has the same bytes, with the same weights
    resumed      the largest of the first two and of the average, in a run that continues a
                 checkpoint of the row before
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from contest import BIN, HERE, Names, Numbers, benchmark, print_table, train

RECIPE = f"{HERE.parent / 'tests/recipes/judged.py'}:whole"
STRATEGIES = ("ddp", "fsdp", "zero2")
COLUMNS = (
    *("strategy", "processes", "logged", "metrics", "AUROC", "average"),
    *("best", "end", "predictions", "resumed"),
)
MIDDLE = 13
"""Step of the checkpoint that is resumed: after the best one, and before the early end."""


@benchmark
@click.option("--worlds", type=Numbers(int, 1), default="1,2,3", show_default=True)
@click.option("--strategies", type=Names(STRATEGIES), default="ddp,fsdp,zero2", show_default=True)
def main(worlds: list[int], strategies: list[str]) -> None:
    """Print a row for each strategy on each number of processes."""
    folder = Path(tempfile.mkdtemp(prefix="around_the_loop-"))
    pairs = [
        (strategy, world)
        for world in worlds
        for strategy in strategies
        if (strategy, world) not in {("ddp", 1), ("fsdp", 1)}
    ]
    try:
        print_table(
            COLUMNS,
            rows([("ddp", 1), *pairs], folder),
            title="largest differences from one process",
        )
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Around:
    """What a finished run has recorded around its steps."""

    logged: dict[str, float]
    """Logged numbers by step and name."""

    metrics: dict[str, float]
    """Metrics by step and name."""

    weights: dict[str, Any]
    """The exported weights: the averages of the best checkpoint."""

    best: int
    end: int

    def differences(self, other: Around) -> list[float]:
        """Return how far logged numbers, metrics and weights are from another run's."""
        return [
            largest(self.logged, other.logged),
            largest(self.metrics, other.metrics),
            max(
                float((self.weights[name] - weight).abs().max() / weight.abs().max())
                for name, weight in other.weights.items()
            ),
        ]


def rows(pairs: list[tuple[str, int]], folder: Path) -> Iterator[list[str]]:
    """Train on each pair of a strategy and a number of processes, and yield its row."""
    for strategy, world in pairs:
        settings = [f"strategy={strategy}", f"checkpoint_every={MIDDLE}"]
        place = folder / f"{strategy}-{world}"
        train("launcher", RECIPE, place, ranks=world, settings=settings, options=[])
    first = folder / "ddp-1"
    alone, expected = read(first), b""
    for number, (strategy, world) in enumerate(pairs):
        on = (f"strategy={strategy}", "-n", str(world))
        found = read(folder / f"{strategy}-{world}")
        predictions = folder / f"{strategy}-{world}.jsonl"
        run("predict", first, "dev", "--out", predictions, *on)
        expected = expected or predictions.read_bytes()
        before = "-".join(map(str, pairs[number - 1]))
        resumed = folder / f"{strategy}-{world}-resumed"
        shutil.copytree(folder / before, resumed)
        run("resume", resumed, "--from", str(MIDDLE), *on)
        auroc = max(
            abs(value - found.metrics[name.replace("auroc", "sklearn")])
            for name, value in found.metrics.items()
            if name.endswith("auroc")
        )
        logged, metrics, average = found.differences(alone)
        yield [
            strategy,
            str(world),
            *map(shown, (logged, metrics, auroc, average)),
            str(found.best),
            str(found.end),
            "=" if predictions.read_bytes() == expected else "differ",
            shown(max(read(resumed).differences(alone))),
        ]


def run(command: str, *arguments: str | Path) -> None:
    """Run a command of launcher.

    Raises:
        click.ClickException: It failed.
    """
    words = [str(BIN / "launcher"), command, *map(str, arguments)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(done.stdout + done.stderr)


def read(folder: Path) -> Around:
    """Return what a run has recorded."""
    from safetensors.torch import load_file

    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Around(
        logged={
            f"{line['step']} {name}": value
            for line in lines
            for name, value in line.items()
            if name.startswith("train/")
        },
        metrics={
            f"{line['step']} {name}": value
            for line in lines
            for name, value in line.get("evaluation", {}).items()
        },
        weights=load_file(folder / "model.safetensors"),
        best=result["weights_step"],
        end=result["steps"],
    )


def largest(values: dict[str, float], reference: dict[str, float]) -> float:
    """Return the largest relative difference; infinite if a value is missing."""
    if values.keys() != reference.keys():
        return math.inf
    return max(
        abs(values[name] - value) / max(abs(value), 1e-30) for name, value in reference.items()
    )


def shown(difference: float) -> str:
    """Return a difference as text; `=` if there is none."""
    return f"{difference:.1e}" if difference else "="


if __name__ == "__main__":
    main()
