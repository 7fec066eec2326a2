"""Steps and examples to one accuracy at each batch size, and what the noise scale said of them.

    python benchmarks/batch_64_to_512.py --out batch.json

Fashion-MNIST on one process, a constant learning rate, for each batch the one that gets there in
the fewest steps. What was measured is fitted by S = S_min (1 + B_crit / B), and set beside the
steps that follow from B_simple, which `launcher find noise` measures before (McCandlish et al.,
arXiv:1812.06162).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import click
from contest import Cell, Numbers, benchmark, print_table
from trainings import Trainings, measure

from launcher.analysis.gradient_noise import fit_steps, steps_ratio

PLAIN = ("label_smoothing=0", "optimizer=sgd(momentum=0.9)", "schedule=constant()", "lr_rule=none")
_LOOKS = 30
"""Evaluations of a training, which tell when it got there."""


@benchmark
@click.option("--batches", type=Numbers(int, 1), default="64,128,256,512,1024", show_default=True)
@click.option("--target", type=click.FloatRange(0, 1), default=0.87, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--samples", type=click.IntRange(min=1), default=120_000, show_default=True)
@click.option("--lrs", type=Numbers(float, 0), default="0.003,0.01,0.03,0.1", show_default=True)
@click.option("--noise-steps", type=click.IntRange(min=2), default=500, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Remember trainings in this file.")
def main(
    batches: list[int],
    target: float,
    seeds: int,
    samples: int,
    lrs: list[float],
    noise_steps: int,
    out: Path | None,
) -> None:
    """Print steps and examples at each batch, measured, fitted and foretold.

    --samples is the most that a training at the smallest batch takes.
    """
    with Trainings("fashion_mnist", out) as trainings:
        compare(trainings, batches, target, seeds, samples, lrs, noise_steps)


def compare(
    trainings: Trainings,
    batches: list[int],
    target: float,
    seeds: int,
    samples: int,
    lrs: list[float],
    noise_steps: int,
) -> None:
    """Train all of it and print the table."""

    def steps_to_target(batch: int, lr: float, seeds: Sequence[int]) -> float | None:
        """Return the mean of the steps over the seeds; None where one does not get there."""
        # A batch beyond the critical one takes up to as many times the samples as it is larger.
        most = int(samples / batches[0] * (batches[0] / batch) ** 0.5)
        every = max(most // _LOOKS, 1)
        found = []
        for seed in seeds:
            settings = (f"batch_size={batch}", f"lr={lr}", f"seed={seed}", f"steps={most}")
            path = trainings.take(*settings, f"evaluate_every={every}", *PLAIN).evaluations
            reached = _crossing(path, target)
            if reached is None:
                return None
            found.append(reached)
        return fmean(found)

    noise = measure("find", "noise", "fashion_mnist", f"steps={noise_steps}", *PLAIN, "lr=0.01")
    halves = noise["halves"]
    measured: dict[int, float] = {}
    best: dict[int, float] = {}
    for batch in batches:
        tried = {lr: steps_to_target(batch, lr, [0]) for lr in lrs}
        reached = {lr: steps for lr, steps in tried.items() if steps is not None}
        if not reached:
            raise click.ClickException(f"no lr reaches {target:.1%} at a batch of {batch}")
        best[batch] = min(reached, key=reached.__getitem__)
        steps = steps_to_target(batch, best[batch], range(seeds))
        measured[batch] = reached[best[batch]] if steps is None else steps
    least, critical = fit_steps(list(measured), list(measured.values()))
    half = noise_steps // 2
    print(
        f"to {target:.1%}: S_min {least:,.0f} steps, B_crit {critical:,.0f} (fitted); B_simple "
        f"{_scale(halves[0])} in the first {half} steps at a batch of 64, {_scale(halves[1])} in "
        f"the next {half} (launcher find noise)\n"
    )
    foretold = (halves[1] or noise["whole"])["b_simple"]
    head = ("batch", "best lr", "steps", "fewer", "as fitted", "as foretold", "examples", "more")
    first = batches[0]
    rows: list[list[Cell]] = [
        [
            f"{batch:,}",
            f"{best[batch]:g}",
            (steps, ",.0f"),
            (measured[first] / steps, ".2f"),
            (1 / steps_ratio(first, batch, critical), ".2f"),
            (1 / steps_ratio(first, batch, foretold), ".2f"),
            (steps * batch, ",.0f"),
            (steps * batch / (measured[first] * first), ".2f"),
        ]
        for batch, steps in measured.items()
    ]
    print_table(head, rows)


def _crossing(path: Sequence[Sequence[float]], target: float) -> float | None:
    """Return the step at which the accuracy crosses the target, between two evaluations."""
    before = (0.0, 0.0)
    for step, accuracy in path:
        if accuracy >= target:
            passed = (target - before[1]) / (accuracy - before[1])
            return before[0] + passed * (step - before[0])
        before = (step, accuracy)
    return None


def _scale(found: dict[str, float] | None) -> str:
    return "unknown" if found is None else f"{found['b_simple']:,.0f}"


if __name__ == "__main__":
    main()
