"""Count the optimizer steps that schedules need to reach the accuracy of a constant learning rate.

    python benchmarks/super_convergence.py --out super_convergence.json

Claim: with the learning rate that `launcher find lr` finds, the 1cycle schedule needs several times
fewer steps than the best constant learning rate (super-convergence). The benchmark trains
Fashion-MNIST with one net and one batch size on one process. The target is the mean accuracy of the
best constant learning rate after its last epoch. The baselines take the learning rates that are
best on the held-out images, which favours them; `launcher find lr` uses training images only. A
schedule spans the steps of its training, so that each number of steps is a training of its own.

Seconds are those of trainings that evaluate once, at their end, in turns with a constant learning
rate: medians over --turns.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median

import click
from contest import Numbers, benchmark, print_table
from trainings import AT_THE_END, Trainings, measure

PLAIN = ("label_smoothing=0", "optimizer=sgd(momentum=0.9)")
"""Settings of the baselines; the last rows train with the recipe's own settings, and with Muon."""

_SGD = "sgd(momentum=0.9, nesterov=true)"

MUON = (
    f'optimizer=muon(adjust="original", weight_decay=0, others={_SGD}, others_lr=2.5)',
    "schedule=one_cycle(pct_start=0.1, three_phase=false, cycle_momentum=false)",
)
"""Muon on the kernels of the convolutions, and SGD on all else: the recipe's other settings stay.
"""

BATCH_SIZE = 64
"""Batch size of the recipe."""


@benchmark
@click.option("--epochs", type=click.IntRange(min=1), default=16, help="Epochs with a constant lr.")
@click.option(
    "--samples",
    type=click.IntRange(min=BATCH_SIZE),
    help="Samples with a constant lr, instead of --epochs.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=3)
@click.option("--budgets", type=Numbers(int, 1), default="938,1250,1500,1875,2500,3750,7500")
@click.option("--constant-lrs", type=Numbers(float, 0), default="0.001,0.003,0.01")
@click.option("--peak-lrs", type=Numbers(float, 0), default="0.01,0.03,0.1,0.3")
@click.option("--muon-lrs", type=Numbers(float, 0), default="0.02,0.04,0.08")
@click.option("--find-steps", type=click.IntRange(min=20), default=200, help="Steps per trial.")
@click.option(
    "--found-lrs",
    type=Numbers(float, 0),
    help="What `find lr` finds for the plain net and for the recipe, if it is known.",
)
@click.option("--turns", type=click.IntRange(min=1), default=3, help="Timed trainings.")
@click.option("--out", type=click.Path(path_type=Path), help="Cache finished trainings in FILE.")
def main(
    epochs: int,
    samples: int | None,
    seeds: int,
    budgets: list[int],
    constant_lrs: list[float],
    peak_lrs: list[float],
    muon_lrs: list[float],
    find_steps: int,
    found_lrs: list[float] | None,
    turns: int,
    out: Path | None,
) -> None:
    """Print the steps that each schedule needs, and its accuracy for each of --budgets.

    The baselines take the best of --constant-lrs and --peak-lrs, and Muon that of --muon-lrs.
    """
    lrs = constant_lrs, peak_lrs, muon_lrs
    length = f"epochs={epochs}" if samples is None else f"steps={samples // BATCH_SIZE}"
    found = found_lrs or [find_lr(find_steps, *PLAIN), find_lr(find_steps)]
    with Trainings("fashion_mnist", out) as trainings:
        timed = compare(trainings, length, range(seeds), budgets, *lrs, found)
        time_in_turns(trainings, timed, turns)


def compare(
    trainings: Trainings,
    length: str,
    seeds: range,
    budgets: list[int],
    constant_lrs: list[float],
    peak_lrs: list[float],
    muon_lrs: list[float],
    found_lrs: list[float],
) -> dict[str, tuple[str, ...]]:
    """Run all trainings and print the table; return the settings that reach the target."""

    def constant(lr: float, seed: int) -> list[list[float]]:
        settings = (length, f"seed={seed}", f"lr={lr}", "schedule=constant()", *PLAIN)
        return trainings.take(*settings).evaluations

    best = max(constant_lrs, key=lambda lr: constant(lr, 0)[-1][1])
    paths = [constant(best, seed) for seed in seeds]
    target, steps = fmean(path[-1][1] for path in paths), int(paths[0][-1][0])
    first_touches = [
        next((f"{int(step):,}" for step, value in path if value >= target), "never")
        for path in paths
    ]
    print(
        f"target: {target:.2%}, the mean over {len(seeds)} seeds of constant lr {best:g} after "
        f"{steps:,} steps; single evaluations first touch it at {', '.join(first_touches)}\n"
    )

    def best_lr(lrs: list[float], *settings: str) -> float:
        middle = budgets[len(budgets) // 2]
        return max(lrs, key=lambda lr: fmean(trainings.final(middle, [0], f"lr={lr}", *settings)))

    plain_lr, recipe_lr = found_lrs
    multi_step, one_cycle = "schedule=multi_step()", "schedule=one_cycle()"
    step_lr, cycle_lr = (best_lr(peak_lrs, each, *PLAIN) for each in (multi_step, one_cycle))
    muon_lr = best_lr(muon_lrs, *MUON)
    contestants = {
        f"step schedule, best lr {step_lr:g}": (f"lr={step_lr}", multi_step, *PLAIN),
        f"1cycle, best lr {cycle_lr:g}": (f"lr={cycle_lr}", one_cycle, *PLAIN),
        f"1cycle, lr found {plain_lr:g}": (f"lr={plain_lr}", one_cycle, *PLAIN),
        f"the recipe, lr found {recipe_lr:g}": (f"lr={recipe_lr}",),
        f"the recipe with Muon, best lr {muon_lr:g}": (f"lr={muon_lr}", *MUON),
    }
    title = f"constant, best lr {best:g}"
    rows = [[title, f"{steps:,}", "1.0", *[""] * len(budgets)]]
    timed: dict[str, tuple[str, ...]] = {
        title: (length, f"lr={best}", "schedule=constant()", *PLAIN)
    }
    for title, settings in contestants.items():
        finals = {budget: trainings.final(budget, seeds, *settings) for budget in budgets}
        reaching = [budget for budget in budgets if fmean(finals[budget]) >= target]
        needed = [f"{reaching[0]:,}", f"{steps / reaching[0]:.1f}"] if reaching else ["", ""]
        if reaching:
            timed[title] = (f"steps={reaching[0]}", *settings)
        cells = [
            f"{fmean(values):.2%} ({min(values):.2%} to {max(values):.2%})"
            for values in finals.values()
        ]
        rows.append([title, *needed, *cells])
    head = (
        "trained with",
        "steps to the target",
        "fewer",
        *(f"{budget:,} steps" for budget in budgets),
    )
    print_table(head, rows)
    return timed


def time_in_turns(trainings: Trainings, timed: dict[str, tuple[str, ...]], turns: int) -> None:
    """Print the seconds of some trainings, and how much faster they are than the first."""
    seconds: dict[str, list[float]] = {title: [] for title in timed}
    for turn in range(turns):
        for title, settings in timed.items():
            result = trainings.again(turn, AT_THE_END, *settings)
            seconds[title].append(result.seconds)
    first = median(next(iter(seconds.values())))
    rows = [
        [title, f"{median(values):.1f}", f"{first / median(values):.1f}"]
        for title, values in seconds.items()
    ]
    print_table(("trained with", "seconds", "times faster"), rows)


def find_lr(steps: int, *settings: str) -> float:
    """Return the learning rate that `launcher find lr` finds for a batch size of 64."""
    search = measure("find", "lr", "fashion_mnist", "--steps", str(steps), *settings)
    return float(f"{search['settings']['lr']:.3g}")


if __name__ == "__main__":
    main()
