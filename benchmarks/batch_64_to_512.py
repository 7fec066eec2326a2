"""Count steps and examples to one accuracy at each batch size, and compare them with predictions.

    python benchmarks/batch_64_to_512.py --out batch.json

Claim: a larger batch needs fewer steps and more examples, and the gradient noise scale predicts by
how much. The benchmark trains Fashion-MNIST on one process with a constant learning rate; for each
batch size it takes the rate that needs the fewest steps. It fits S = S_min (1 + B_crit / B) to the
measured steps, and prints beside them the steps that follow from the B_crit that `launcher find
noise` predicts beforehand (McCandlish et al., arXiv:1812.06162).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import click
from contest import Cell, Numbers, benchmark, print_table
from trainings import Trainings, measure

from launcher.analysis.gradient_noise import critical_batch, fit_steps, steps_ratio

PLAIN = ("label_smoothing=0", "optimizer=sgd(momentum=0.9)", "schedule=constant()", "lr_rule=none")


@benchmark
@click.option("--batches", type=Numbers(int, 1), default="64,128,256,512,1024", show_default=True)
@click.option("--target", type=click.FloatRange(0, 1), default=0.87, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=120_000,
    show_default=True,
    help="Limit of samples for a training at the smallest batch size.",
)
@click.option("--lrs", type=Numbers(float, 0), default="0.003,0.01,0.03,0.1", show_default=True)
@click.option(
    "--evaluations",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="Evaluations during a training, between which the crossing of the target is interpolated.",
)
@click.option("--noise-steps", type=click.IntRange(min=2), default=500, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Cache finished trainings in FILE.")
def main(
    batches: list[int],
    target: float,
    seeds: int,
    samples: int,
    lrs: list[float],
    evaluations: int,
    noise_steps: int,
    out: Path | None,
) -> None:
    """Print steps and examples at each batch size: measured, fitted and predicted."""
    with Trainings("fashion_mnist", out) as trainings:
        compare(trainings, batches, target, seeds, samples, lrs, evaluations, noise_steps)


def compare(
    trainings: Trainings,
    batches: list[int],
    target: float,
    seeds: int,
    samples: int,
    lrs: list[float],
    evaluations: int,
    noise_steps: int,
) -> None:
    """Run all trainings and print the table."""

    def steps_to_target(batch: int, lr: float, seeds: Sequence[int]) -> float | None:
        """Return the mean steps over the seeds; None if a training misses the target."""
        # Beyond the critical batch size the samples grow in proportion to the batch, so the limit
        # of steps shrinks only with its square root.
        max_steps = int(samples / batches[0] * (batches[0] / batch) ** 0.5)
        every = max(max_steps // evaluations, 1)
        steps_per_seed = []
        for seed in seeds:
            settings = (f"batch_size={batch}", f"lr={lr}", f"seed={seed}", f"steps={max_steps}")
            path = trainings.take(*settings, f"evaluate_every={every}", *PLAIN).evaluations
            crossing = _crossing(path, target)
            if crossing is None:
                return None
            steps_per_seed.append(crossing)
        return fmean(steps_per_seed)

    noise = measure("find", "noise", "fashion_mnist", f"steps={noise_steps}", *PLAIN, "lr=0.01")
    halves = noise["halves"]
    measured: dict[int, float] = {}
    best: dict[int, float] = {}
    for batch in batches:
        steps_by_lr = {lr: steps_to_target(batch, lr, [0]) for lr in lrs}
        reached = {lr: steps for lr, steps in steps_by_lr.items() if steps is not None}
        if not reached:
            raise click.ClickException(
                f"No learning rate of --lrs reaches {target:.1%} at a batch size of {batch}. "
                "Raise --samples or add learning rates."
            )
        best[batch] = min(reached, key=reached.__getitem__)
        steps = steps_to_target(batch, best[batch], range(seeds))
        measured[batch] = reached[best[batch]] if steps is None else steps
    min_steps, critical = fit_steps(list(measured), list(measured.values()))
    half = noise_steps // 2
    print(
        f"to {target:.1%}: S_min {min_steps:,.0f} steps, B_crit {critical:,.0f} (fitted); "
        f"B_simple {_noise_scale_text(halves[0])} in the first {half} steps at a batch size of 64, "
        f"{_noise_scale_text(halves[1])} in the next {half} (launcher find noise)"
    )
    predicted = critical_batch((halves[1] or noise["whole"])["b_simple"], noise["momentum"])
    print(f"B_crit {predicted:,.0f} (predicted from the latter and the momentum)\n")
    head = ("batch", "best lr", "steps", "fewer", "fitted", "predicted", "examples", "more")
    first = batches[0]
    rows: list[list[Cell]] = [
        [
            f"{batch:,}",
            f"{best[batch]:g}",
            (steps, ",.0f"),
            (measured[first] / steps, ".2f"),
            (1 / steps_ratio(first, batch, critical), ".2f"),
            (1 / steps_ratio(first, batch, predicted), ".2f"),
            (steps * batch, ",.0f"),
            (steps * batch / (measured[first] * first), ".2f"),
        ]
        for batch, steps in measured.items()
    ]
    print_table(head, rows)


def _crossing(path: Sequence[Sequence[float]], target: float) -> float | None:
    """Return the step at which the accuracy reaches the target, interpolated linearly.

    Args:
        path: (step, accuracy) of each evaluation.
        target: Accuracy to reach.
    """
    previous = (0.0, 0.0)
    for step, accuracy in path:
        if accuracy >= target:
            fraction = (target - previous[1]) / (accuracy - previous[1])
            return previous[0] + fraction * (step - previous[0])
        previous = (step, accuracy)
    return None


def _noise_scale_text(estimate: dict[str, float] | None) -> str:
    return "unknown" if estimate is None else f"{estimate['b_simple']:,.0f}"


if __name__ == "__main__":
    main()
