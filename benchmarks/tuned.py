"""What `launcher tune` is worth: the time to one accuracy, before and after.

    python benchmarks/tuned.py --out tuned.json

The recipe in untuned.py is tuned, once. Its accuracy after all of its epochs is the target; with
what was found it is trained for fewer and fewer of them, each a training of its own, in turns with
the untuned one. Evaluation is left to the end of each.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from statistics import fmean, median

import click
from contest import BIN, HERE, Cell, Numbers, benchmark, print_table
from trainings import AT_THE_END, Trainings

RECIPE = f"{HERE / 'untuned.py'}:untuned"


@benchmark
@click.option("--epochs", type=click.IntRange(min=1), default=16, help="Of the untuned recipe.")
@click.option("--tuned-epochs", type=Numbers(int, 1), default="1,2,3,4,6", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--find-steps", type=click.IntRange(min=40), default=200, help="Of each search.")
@click.option("--out", type=click.Path(path_type=Path), help="Remember trainings in this file.")
def main(
    epochs: int,
    tuned_epochs: list[int],
    seeds: int,
    ranks: int,
    find_steps: int,
    out: Path | None,
) -> None:
    """Print seconds and accuracy of each training, and the ratio of the times."""
    with tempfile.TemporaryDirectory() as folder, Trainings(RECIPE, out, ranks=ranks) as trainings:
        file, lines = tune(Path(folder) / "tuned", ranks, find_steps)
        print("\n".join(lines), "\n")
        ways = {"untuned": [f"epochs={epochs}"]}
        ways |= {f"tuned, {each}": [*read(file), f"epochs={each}"] for each in tuned_epochs}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for seed in range(seeds):
            for name, settings in ways.items():
                took = trainings.take(*settings, f"seed={seed}", AT_THE_END)
                found[name].append((took.seconds, took.evaluations[-1][1]))
    seconds = {name: median(each for each, _ in pairs) for name, pairs in found.items()}
    rows: list[list[Cell]] = []
    for name, pairs in found.items():
        accuracies = [accuracy for _, accuracy in pairs]
        spread = f"{min(accuracies):.2%} to {max(accuracies):.2%}"
        ratio = seconds["untuned"] / seconds[name], ".1f"
        lasted = seconds[name], ",.1f"
        rows.append([name, (fmean(accuracies), ".2%"), spread, lasted, ratio])
    print_table(("recipe, epochs", "accuracy", "seeds", "seconds", "faster"), rows)


def tune(folder: Path, ranks: int, steps: int) -> tuple[Path, list[str]]:
    """Tune the recipe; return the file and its lines."""
    command = ["tune", RECIPE, "-n", str(ranks), "device=cpu", "--out", str(folder)]
    command += ["--steps", str(steps)]
    subprocess.run([str(BIN / "launcher"), *command], stdout=subprocess.DEVNULL, check=True)
    file = folder / "tuned.yaml"
    return file, file.read_text().splitlines()


def read(file: Path) -> list[str]:
    """Return what was found as name=value, less what a training is given anyway."""
    import yaml

    values = yaml.safe_load(file.read_text())
    return [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in values.items()
        if name not in ("device", "epochs")
    ]


if __name__ == "__main__":
    main()
