"""Super-convergence: optimizer steps to the accuracy that a constant learning rate ends at.

    python benchmarks/super_convergence.py --out super_convergence.json

Fashion-MNIST, one net, one batch size, on one process. The target is what the best constant
learning rate averages at the end of its epochs. The baselines get the learning rates that are best
on the held-out images themselves, which favours them; the learning rate of the last rows is the
one that `launcher find lr` suggests, which sees training images alone. A schedule spans whatever
number of steps it is given, so each number is a training of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import click
from contest import BIN, Numbers, print_table, train

from launcher.rundir import write_json

PLAIN = ("label_smoothing=0", "optimizer=sgd(momentum=0.9)")
"""What the baselines train with; the recipe's own settings are those of the last row."""

CONSTANT_LRS = (0.001, 0.003, 0.01)
PEAK_LRS = (0.03, 0.1, 0.3)
_NEVER = 10**9


class Trainings:
    """Trains, and remembers what came of it, so that what was stopped goes on.

    Args:
        kept: A file to remember in.
        folder: Where to train.
    """

    def __init__(self, kept: Path, folder: Path) -> None:
        self._kept, self._folder = kept, folder
        self._known: dict[str, list[list[float]]] = (
            json.loads(kept.read_text()) if kept.is_file() else {}
        )

    def accuracies(self, *settings: str) -> list[list[float]]:
        """Return (step, accuracy) of each evaluation of a training."""
        key = " ".join(settings)
        if key not in self._known:
            out = self._folder / str(len(self._known))
            run_dir = train(
                "launcher", "fashion_mnist", out, ranks=1, settings=settings, options=[]
            )
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


@click.command()
@click.option("--epochs", type=click.IntRange(min=1), default=16, help="Of a constant lr.")
@click.option("--seeds", type=click.IntRange(min=1), default=3)
@click.option("--budgets", type=Numbers(), default="938,1250,1500,1875,2500,3750,7500")
@click.option("--out", type=click.Path(path_type=Path), help="Remember trainings in this file.")
def main(epochs: int, seeds: int, budgets: list[int], out: Path | None) -> None:
    """Print the steps that each schedule needs, and the accuracies on the way."""
    folder = Path(tempfile.mkdtemp(prefix="super_convergence-"))
    try:
        compare(Trainings(out or folder / "kept.json", folder), epochs, range(seeds), budgets)
    finally:
        shutil.rmtree(folder)


def compare(trainings: Trainings, epochs: int, seeds: range, budgets: list[int]) -> None:
    """Train all of it and print the table."""

    def constant(lr: float, seed: int) -> list[list[float]]:
        settings = (f"epochs={epochs}", f"seed={seed}", f"lr={lr}", "schedule=constant()", *PLAIN)
        return trainings.accuracies(*settings)

    best = max(CONSTANT_LRS, key=lambda lr: constant(lr, 0)[-1][1])
    paths = [constant(best, seed) for seed in seeds]
    target, steps = fmean(path[-1][1] for path in paths), int(paths[0][-1][0])
    touched = [next(int(step) for step, value in path if value >= target) for path in paths]
    print(
        f"target: {target:.2%}, the mean over {len(seeds)} seeds of constant lr {best:g} after "
        f"{steps:,} steps; single evaluations first touch it at "
        f"{', '.join(f'{step:,}' for step in touched)}\n"
    )

    def tuned(schedule: str) -> float:
        middle = budgets[len(budgets) // 2]
        return max(
            PEAK_LRS,
            key=lambda lr: fmean(trainings.final(middle, [0], f"lr={lr}", schedule, *PLAIN)),
        )

    found, found_smoothed = find_lr(*PLAIN), find_lr()
    rescaled, cycle = "schedule=multi_step()", "schedule=one_cycle()"
    step_lr, cycle_lr = tuned(rescaled), tuned(cycle)
    ways = {
        f"step schedule, best lr {step_lr:g}": (f"lr={step_lr}", rescaled, *PLAIN),
        f"1cycle, best lr {cycle_lr:g}": (f"lr={cycle_lr}", cycle, *PLAIN),
        f"1cycle, lr found {found:g}": (f"lr={found}", cycle, *PLAIN),
        f"the recipe, lr found {found_smoothed:g}": (f"lr={found_smoothed}",),
    }
    rows = [[f"constant, best lr {best:g}", f"{steps:,}", "1.0", *[""] * len(budgets)]]
    for title, settings in ways.items():
        finals = {budget: trainings.final(budget, seeds, *settings) for budget in budgets}
        enough = [budget for budget in budgets if fmean(finals[budget]) >= target]
        needed = [f"{enough[0]:,}", f"{steps / enough[0]:.1f}"] if enough else ["", ""]
        cells = [
            f"{fmean(values):.2%} ({min(values):.2%} to {max(values):.2%})"
            for values in finals.values()
        ]
        rows.append([title, *needed, *cells])
    head = (
        "trained with",
        "steps to the target",
        "fewer",
        *(f"{each:,} steps" for each in budgets),
    )
    print_table(head, rows)


def find_lr(*settings: str) -> float:
    """Return what `launcher find lr --try` finds for a batch of 64."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["find", "lr", "fashion_mnist", "-n", "1", "device=cpu", "--try", "--json"]
        done = subprocess.run(
            [str(BIN / "launcher"), *command, *settings, "--out", f"{folder}/out"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return float(f"{json.loads(done.stdout)['settings']['lr']:.3g}")


if __name__ == "__main__":
    main()
