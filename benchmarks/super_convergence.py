"""Super-convergence: optimizer steps to the accuracy that a constant learning rate ends at.

    python benchmarks/super_convergence.py --out super_convergence.json

Fashion-MNIST, one net, one batch size, on one process. The target is what the best constant
learning rate averages at the end of its epochs. The baselines get the learning rates that are best
on the held-out images themselves, which favours them; the learning rate of the last rows is the
one that `launcher find lr` suggests, which sees training images alone. A schedule spans whatever
number of steps it is given, so each number is a training of its own.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import click
from contest import Numbers, benchmark, print_table
from trainings import Trainings, measure

PLAIN = ("label_smoothing=0", "optimizer=sgd(momentum=0.9)")
"""What the baselines train with; the recipe's own settings are those of the last row."""


@benchmark
@click.option("--epochs", type=click.IntRange(min=1), default=16, help="Of a constant lr.")
@click.option("--seeds", type=click.IntRange(min=1), default=3)
@click.option("--budgets", type=Numbers(int, 1), default="938,1250,1500,1875,2500,3750,7500")
@click.option("--constant-lrs", type=Numbers(float, 0), default="0.001,0.003,0.01")
@click.option("--peak-lrs", type=Numbers(float, 0), default="0.01,0.03,0.1,0.3")
@click.option("--find-steps", type=click.IntRange(min=20), default=200, help="Of each trial.")
@click.option("--out", type=click.Path(path_type=Path), help="Remember trainings in this file.")
def main(
    epochs: int,
    seeds: int,
    budgets: list[int],
    constant_lrs: list[float],
    peak_lrs: list[float],
    find_steps: int,
    out: Path | None,
) -> None:
    """Print the steps that each schedule needs, and the accuracies on the way.

    The baselines take the best of --constant-lrs and --peak-lrs.
    """
    with Trainings("fashion_mnist", out) as trainings:
        compare(trainings, epochs, range(seeds), budgets, constant_lrs, peak_lrs, find_steps)


def compare(
    trainings: Trainings,
    epochs: int,
    seeds: range,
    budgets: list[int],
    constant_lrs: list[float],
    peak_lrs: list[float],
    find_steps: int,
) -> None:
    """Train all of it and print the table."""

    def constant(lr: float, seed: int) -> list[list[float]]:
        settings = (f"epochs={epochs}", f"seed={seed}", f"lr={lr}", "schedule=constant()", *PLAIN)
        return trainings.take(*settings).evaluations

    best = max(constant_lrs, key=lambda lr: constant(lr, 0)[-1][1])
    paths = [constant(best, seed) for seed in seeds]
    target, steps = fmean(path[-1][1] for path in paths), int(paths[0][-1][0])
    touched = [
        next((f"{int(step):,}" for step, value in path if value >= target), "never")
        for path in paths
    ]
    print(
        f"target: {target:.2%}, the mean over {len(seeds)} seeds of constant lr {best:g} after "
        f"{steps:,} steps; single evaluations first touch it at {', '.join(touched)}\n"
    )

    def tuned(schedule: str) -> float:
        middle = budgets[len(budgets) // 2]
        return max(
            peak_lrs,
            key=lambda lr: fmean(trainings.final(middle, [0], f"lr={lr}", schedule, *PLAIN)),
        )

    found, found_smoothed = find_lr(find_steps, *PLAIN), find_lr(find_steps)
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


def find_lr(steps: int, *settings: str) -> float:
    """Return what `launcher find lr --try` finds for a batch of 64."""
    found = measure("find", "lr", "fashion_mnist", "--try", "--steps", str(steps), *settings)
    return float(f"{found['settings']['lr']:.3g}")


if __name__ == "__main__":
    main()
