"""Compare the learning rate that `launcher find lr` finds with the best of whole trainings.

    python benchmarks/lr_finder.py --cache build/lr_finder.json

Question: how often is each rule of `launcher find lr` within a factor of 2 of the best learning
rate? The best one is that of a grid by factors of 2, by the held-out loss at the end of whole
1cycle trainings, as a mean over seeds. Each search is repeated for several seeds. The rule and its
constants were chosen by the recipes of the first table; those of the second were held out. The last
column is the final held-out loss of whole trainings at the learning rates that `trainings` found,
one training for each search, relative to those at the best of the grid with the same seeds: the
mean, and the worst search. Everything runs in this process on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import click
import torch
from contest import Cell, Names, benchmark, print_table
from lr_recipes import Case, Group, cases
from lr_trainings import CachedTrainings

from launcher.analysis.lr_curve import Divergence, LossCurve, lowest_lr
from launcher.analysis.lr_trials import (
    DEFAULT_STEPS,
    LRTrial,
    final_loss,
    fitted_lr,
    for_length,
    next_lr,
)

LOWEST, HIGHEST = 1e-6, 10.0
"""Learning rates of the first and the last step of a range test, as in `launcher find lr`."""

RULES = "lowest", "trainings"

CASES = cases()


class Search(NamedTuple):
    """What one search for a learning rate found."""

    found: dict[str, float | None]
    """The learning rate by rule."""

    steps: int
    """Optimizer steps of the range test and the short trainings."""


@benchmark
@click.option("--only", type=Names(CASES), default=",".join(CASES), help="Recipes; default: all.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--searches", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--steps", type=click.IntRange(min=40), default=DEFAULT_STEPS, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), help="Cache finished trainings in FILE.")
def main(only: list[str], seeds: int, searches: int, steps: int, cache: Path | None) -> None:
    """Print the best learning rate of each recipe, what each rule found, and how often it is right.

    A whole training is repeated for --seeds, and a search --searches times with --steps steps at
    each learning rate.
    """
    torch.set_num_threads(1)
    trainings = CachedTrainings(cache)
    for group in Group:
        names = [name for name in only if CASES[name].group is group]
        if names:
            compare(group.value, names, trainings, seeds, searches, steps)


def compare(
    title: str,
    names: Sequence[str],
    trainings: CachedTrainings,
    seeds: int,
    searches: int,
    steps: int,
) -> None:
    """Print the table of some recipes, and how often each rule is right."""
    rows: list[list[Cell]] = []
    right = dict.fromkeys(RULES, 0)
    spent = []
    for name in names:
        case = CASES[name]
        best = find_best(case, trainings, seeds)
        results = [find_lr(case, trainings, seed, steps) for seed in range(searches)]
        spent += [result.steps for result in results]
        cells: list[Cell] = []
        for rule in RULES:
            found = [result.found[rule] for result in results]
            right[rule] += sum(is_right(lr, best) for lr in found)
            cells.append(" ".join("none" if lr is None else f"{lr:.3g}" for lr in found))
        excess = [
            trainings.whole(case, result.found["trainings"] or best, seed)
            / trainings.whole(case, best, seed)
            - 1
            for seed, result in enumerate(results)
        ]
        loss = f"{fmean(excess):+.1%}, {max(excess):+.1%}"
        rows.append([name, f"{case.recipe.steps:,}", (best, ".3g"), *cells, loss])
    print(f"\n{title}: recipes {len(names)}, searches of each {searches}")
    head = ("recipe", "steps", "best lr", *RULES, "loss: mean, worst")
    print_table(head, rows)
    total = searches * len(names)
    for rule in RULES:
        print(
            f"{rule}: within a factor of 2 in {right[rule]} of {total}, {right[rule] / total:.0%}"
        )
    print(f"steps of a search: {fmean(spent):.0f} on average")


def is_right(lr: float | None, best: float) -> bool:
    """Return whether a learning rate is within a factor of 2 of the best."""
    return lr is not None and abs(math.log2(lr / best)) <= 1


def find_best(case: Case, trainings: CachedTrainings, seeds: int) -> float:
    """Return the learning rate of the grid with the lowest final held-out loss.

    Both of its neighbours have been tried with all seeds.
    """

    def loss(exponent: int, num_seeds: int) -> float:
        return fmean(trainings.whole(case, grid(exponent), seed) for seed in range(num_seeds))

    best = 0 if case.recipe.optimizer.name == "sgd" else -3  # type: ignore[union-attr]
    # One seed finds the region, in steps of 4 and then of 2.
    for step, num_seeds in ((2, 1), (1, 1), (1, seeds)):
        while True:
            around = (best - step, best, best + step)
            lowest = min(around, key=lambda exponent: loss(exponent, num_seeds))
            if lowest == best:
                break
            best = lowest
    return grid(best)


def grid(exponent: int) -> float:
    """Return a learning rate of the grid."""
    return 0.1 * 2.0**exponent


def find_lr(case: Case, trainings: CachedTrainings, seed: int, steps: int) -> Search:
    """Search as `launcher find lr` does, with another seed of the recipe."""
    losses = trainings.range_test(case, LOWEST, HIGHEST, steps, seed).losses
    ratio = HIGHEST / LOWEST
    lrs = [LOWEST * ratio ** (step / (steps - 1)) for step in range(len(losses))]
    divergence = Divergence()
    end = next((i + 1 for i, loss in enumerate(losses) if divergence.add(loss)), len(losses))
    lowest, _ = lowest_lr(LossCurve(lrs=tuple(lrs[:end]), losses=tuple(losses[:end])))
    trials: list[LRTrial] = []
    num_steps = end
    assert case.recipe.steps is not None
    length = min(steps, case.recipe.steps)
    while lowest is not None and (lr := next_lr(trials, lowest)) is not None:
        short = trainings.short(case, lr, length, seed)
        num_steps += len(short.losses)
        points = tuple(short.losses)
        curve = LossCurve(lrs=points, losses=points, held_out=short.held_out)
        trials.append(LRTrial(lr=lr, loss=final_loss(curve, length)))
    found = fitted_lr(trials)
    if found is not None:
        found = for_length(found, length, case.recipe.steps)
    return Search({"lowest": lowest, "trainings": found}, num_steps)


if __name__ == "__main__":
    main()
