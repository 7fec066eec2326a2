"""Measure the time that a recipe takes to one accuracy, before and after `launcher tune`.

    python benchmarks/tuned.py --out tuned.json

Claim: a tuned recipe reaches the accuracy of an untuned one in a fraction of the time. The
benchmark tunes the recipe in untuned.py once. The target is the accuracy of the untuned recipe
after all of its epochs. The tuned recipe trains for several smaller numbers of epochs, each a
training of its own, in turns with the untuned recipe. Each training evaluates only at its end.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from statistics import fmean, median

import click
from contest import BIN, HERE, Cell, Numbers, benchmark, print_table
from trainings import AT_THE_END, TrainingResult, Trainings

RECIPE = f"{HERE / 'untuned.py'}:untuned"


@benchmark
@click.option(
    "--epochs", type=click.IntRange(min=1), default=16, help="Epochs of the untuned recipe."
)
@click.option("--tuned-epochs", type=Numbers(int, 1), default="1,2,3,4,6", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--find-steps", type=click.IntRange(min=40), default=200, help="Steps per search.")
@click.option("--out", type=click.Path(path_type=Path), help="Cache finished trainings in FILE.")
def main(
    epochs: int,
    tuned_epochs: list[int],
    seeds: int,
    ranks: int,
    find_steps: int,
    out: Path | None,
) -> None:
    """Print the seconds and the accuracy of each training, and the ratio of the times."""
    with tempfile.TemporaryDirectory() as folder, Trainings(RECIPE, out, ranks=ranks) as trainings:
        file, lines = tune(Path(folder) / "tuned", ranks, find_steps)
        print("\n".join(lines), "\n")
        tuned = read_settings(file)
        variants = {"untuned": [f"epochs={epochs}"]}
        variants |= {f"tuned, {count}": [*tuned, f"epochs={count}"] for count in tuned_epochs}
        results: dict[str, list[TrainingResult]] = {name: [] for name in variants}
        for seed in range(seeds):
            for name, settings in variants.items():
                results[name].append(trainings.take(*settings, f"seed={seed}", AT_THE_END))
    seconds = {name: median(run.seconds for run in runs) for name, runs in results.items()}
    rows: list[list[Cell]] = []
    for name, runs in results.items():
        accuracies = [run.evaluations[-1][1] for run in runs]
        spread = f"{min(accuracies):.2%} to {max(accuracies):.2%}"
        ratio = seconds["untuned"] / seconds[name], ".1f"
        duration = seconds[name], ",.1f"
        rows.append([name, (fmean(accuracies), ".2%"), spread, duration, ratio])
    print_table(("recipe, epochs", "accuracy", "seeds", "seconds", "faster"), rows)


def tune(folder: Path, ranks: int, steps: int) -> tuple[Path, list[str]]:
    """Tune the recipe; return the path of tuned.yaml and its lines."""
    command = ["tune", RECIPE, "-n", str(ranks), "device=cpu", "--out", str(folder)]
    command += ["--steps", str(steps)]
    subprocess.run([str(BIN / "launcher"), *command], stdout=subprocess.DEVNULL, check=True)
    file = folder / "tuned.yaml"
    return file, file.read_text().splitlines()


def read_settings(file: Path) -> list[str]:
    """Return the settings of tuned.yaml as name=value, without those that every training sets."""
    import yaml

    values = yaml.safe_load(file.read_text())
    return [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in values.items()
        if name not in ("device", "epochs")
    ]


if __name__ == "__main__":
    main()
