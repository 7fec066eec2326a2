"""Measure the time and the steps to an accuracy on Fashion-MNIST, with the recipe `speedrun`.

    python benchmarks/speedrun.py

Claim: the recipe `speedrun` reaches 90 % in a fraction of the steps and seconds that the recipe
`fashion_mnist` needs with a constant learning rate. Both train the same net on one process. The
first table follows constant learning rates and finds the first epoch after which the mean accuracy
over the seeds reaches the target; such a training is the beginning of a longer one. The second
table trains for that many epochs, with one evaluation at the end, in turns with `speedrun`. It has
the seconds of the steps with the evaluation, and those of the whole command, which imports torch
and reads the data; both are medians.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from operator import attrgetter
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import click
from contest import Cell, Numbers, benchmark, print_table, train
from trainings import AT_THE_END, Trainings

CONSTANT = ("schedule=constant()", "label_smoothing=0", "optimizer=sgd(momentum=0.9)")
"""Settings of a tutorial, in place of those of the recipe; super_convergence.py has the same, so
that both may have one --out."""


HEAD = (
    *("recipe", "accuracy", "seeds", "steps", "fewer", "samples"),
    *("s to train", "faster", "s in all", "faster"),
)


class Finished(NamedTuple):
    """What a training came to."""

    accuracy: float
    steps: int
    samples: int
    training_seconds: float
    """Seconds of the steps and of the evaluation."""

    seconds: float
    """Seconds from the start of the command to its end."""


@benchmark
@click.option("--target", type=click.FloatRange(0.1, 1), default=0.9, show_default=True)
@click.option("--lrs", type=Numbers(float, 0), default="0.003", show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Cache long trainings in FILE.")
def main(
    target: float,
    lrs: list[float],
    epochs: int,
    seeds: int,
    turns: int,
    ranks: int,
    out: Path | None,
) -> None:
    """Print the epochs to --target of each constant learning rate, and the times to it."""
    with Trainings("fashion_mnist", out, ranks=ranks) as trainings:
        means = {lr: mean_path(trainings, lr, epochs, seeds) for lr in lrs}
    needed = {
        lr: next((epoch for epoch, mean in enumerate(path, 1) if mean >= target), None)
        for lr, path in means.items()
    }
    rows: list[list[Cell]] = [
        [f"{lr:g}", str(needed[lr] or "more"), (max(path), ".2%"), (path[-1], ".2%")]
        for lr, path in means.items()
    ]
    head = ("constant lr", f"epochs to {target:.1%}", "best epoch", f"after {epochs} epochs")
    print_table(head, rows, title=f"Mean accuracy of {seeds} seeds")
    best = min(lrs, key=lambda lr: needed[lr] or epochs + 1)
    untuned = [f"lr={best}", *CONSTANT, f"epochs={needed[best] or epochs}", AT_THE_END]
    variants = {f"fashion_mnist, constant lr {best:g}": untuned, "speedrun": []}
    results = timed(variants, turns, ranks)
    base = next(iter(results.values()))
    title = f"{ranks} process{'es' * (ranks > 1)}, medians of {turns} turns"
    print_table(HEAD, [row(name, runs, base) for name, runs in results.items()], title=title)


def mean_path(trainings: Trainings, lr: float, epochs: int, seeds: int) -> list[float]:
    """Return the mean accuracy after each epoch with a constant learning rate."""
    paths = [
        trainings.take(f"epochs={epochs}", f"seed={seed}", f"lr={lr}", *CONSTANT).evaluations
        for seed in range(seeds)
    ]
    return [fmean(accuracy for _, accuracy in points) for points in zip(*paths, strict=True)]


def timed(variants: dict[str, list[str]], turns: int, ranks: int) -> dict[str, list[Finished]]:
    """Train each variant in turns, each with its own seed; return what they came to by name."""
    results: dict[str, list[Finished]] = {name: [] for name in variants}
    folder = Path(tempfile.mkdtemp(prefix="speedrun-"))
    try:
        for seed in range(turns):
            for name, settings in variants.items():
                started = time.monotonic()
                run_dir = train(
                    "launcher",
                    name.partition(",")[0],
                    folder / f"{len(results[name])}-{name}",
                    ranks=ranks,
                    settings=[*settings, f"seed={seed}"],
                    options=[],
                )
                seconds = time.monotonic() - started
                result = json.loads(run_dir.result.read_text())
                results[name].append(
                    Finished(
                        result["evaluation"]["accuracy"],
                        result["steps"],
                        result["samples"],
                        result["seconds"],
                        seconds,
                    )
                )
    finally:
        shutil.rmtree(folder)
    return results


def row(name: str, runs: list[Finished], base: list[Finished]) -> list[Cell]:
    """Return the cells of a recipe, whose ratios are to `base`."""
    accuracies = [run.accuracy for run in runs]
    cells: list[Cell] = [
        name,
        (fmean(accuracies), ".2%"),
        f"{min(accuracies):.2%} to {max(accuracies):.2%}",
        f"{runs[0].steps:,}",
        (base[0].steps / runs[0].steps, ".1f"),
        f"{runs[0].samples:,}",
    ]
    for get in (attrgetter("training_seconds"), attrgetter("seconds")):
        seconds = median(map(get, runs))
        cells += [(seconds, ".1f"), (median(map(get, base)) / seconds, ".1f")]
    return cells


if __name__ == "__main__":
    main()
