"""Compare forecasts of the steps at each batch size with measured steps, on several small recipes.

    python benchmarks/batch_forecast.py --cache build/batch_forecast.json

Question: how well does the critical batch that `launcher find noise` prints predict the steps to a
loss at other batch sizes? Each recipe trains with a constant learning rate until its held-out loss
reaches a target. At each batch size the steps are those of the best of four or five learning rates
by factors of 2: a mean over 3 seeds for the two that are best with one. The noise is measured in
the best training at the smallest batch, and the forecast takes the second half of its steps.
Everything runs in this process on one thread, with the recipes of lr_recipes.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import click
import torch
from contest import Cell, Names, Numbers, benchmark, print_table
from lr_recipes import cases

from launcher import constant, make_plan, read_machine
from launcher.analysis.gradient_noise import (
    Measurement,
    critical_batch,
    estimate_noise_scale,
    fit_steps,
    steps_ratio,
)
from launcher.engine.backends.local import LocalBackend
from launcher.engine.metrics.meter import RankFlags
from launcher.engine.probes.measuring import MetricsCollector
from launcher.engine.training.build import build_context
from launcher.engine.training.context import StepController
from launcher.engine.training.loop import train
from launcher.runs.files import write_json

_EVALUATIONS = 60
"""Evaluations of the longest training at a batch size, between which a crossing is interpolated."""

_PARTS = 4
"""Micro-batches whose gradients are compared."""

CASES = cases()


class Race(NamedTuple):
    """A recipe and the loss that it has to reach."""

    recipe: str
    """Name in lr_recipes.py."""

    loss: float
    """Held-out loss to reach."""

    lrs: tuple[float, ...]
    """Learning rates at the smallest batch; they rise with the square root of the batch."""

    steps: int
    """Limit of steps at the smallest batch; it falls with the square root of the batch."""


RACES = {
    "mlp-plain-sgd": Race("mlp-plain-sgd-128", 0.40, (0.125, 0.25, 0.5, 1.0), 1500),
    "mlp-sgd": Race("mlp-sgd-64", 0.40, (0.0125, 0.025, 0.05, 0.1, 0.2), 1500),
    "conv-sgd": Race("conv-sgd-64", 0.42, (0.0125, 0.025, 0.05, 0.1, 0.2), 1200),
    "tabular-sgd": Race("tabular-sgd-512", 0.0145, (0.0125, 0.025, 0.05, 0.1, 0.2), 2500),
    "mlp-adamw": Race("mlp-adamw-512", 0.40, (0.001, 0.002, 0.004, 0.008), 1500),
    "mlp-muon": Race("mlp-muon-64", 0.40, (0.0025, 0.005, 0.01, 0.02), 1500),
    "conv-adamw": Race("conv-adamw-64", 0.42, (0.001, 0.002, 0.004, 0.008), 1200),
}


class _Collector(MetricsCollector):
    """Keeps evaluations as well."""

    def __init__(self) -> None:
        super().__init__(None)
        self.evaluations: list[tuple[int, float]] = []

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        self.evaluations.append((step, values["loss"]))


class _StopAtLoss(StepController):
    """Stops when the held-out loss has reached a target, or the training loss is not finite.

    Args:
        collector: Receives the losses.
        target: The held-out loss.
    """

    def __init__(self, collector: _Collector, target: float) -> None:
        self._collector, self._target = collector, target

    def on_step_end(self, step: int, flags: RankFlags) -> bool:
        rows, evaluations = self._collector.rows, self._collector.evaluations
        if rows and not math.isfinite(rows[-1].loss):
            return True
        return bool(evaluations) and evaluations[-1][1] <= self._target


class Races:
    """Trains and caches the results, so that an interrupted benchmark can continue.

    Args:
        cache: JSON file with the results, read if it exists; None caches in memory only.
        first: The smallest batch.
    """

    def __init__(self, cache: Path | None, first: int) -> None:
        self._cache, self._first = cache, first
        self._results: dict[str, Any] = (
            json.loads(cache.read_text()) if cache and cache.is_file() else {}
        )
        self._machine = read_machine()

    def steps(self, name: str, batch: int, lr: float, seed: int) -> float | None:
        """Return the steps to the loss; None if it is not reached."""
        return self._take(name, batch, lr, seed, with_noise=False)["steps"]  # type: ignore[no-any-return]

    def noise(self, name: str, lr: float) -> tuple[list[Measurement], float]:
        """Return the measurements of the noise at the smallest batch, and the momentum."""
        result = self._take(name, self._first, lr, 0, with_noise=True)
        return [Measurement(**values) for values in result["noise"]], result["momentum"]

    def best(self, name: str, batch: int, num_seeds: int) -> tuple[float, float] | None:
        """Return the best learning rate and its mean steps; None if no training arrives."""
        rise = 2.0 ** round(math.log2((batch / self._first) ** 0.5))
        lrs = [lr * rise for lr in RACES[name].lrs]
        reached = {lr: steps for lr in lrs if (steps := self.steps(name, batch, lr, 0)) is not None}
        means = {}
        for lr in sorted(reached, key=reached.__getitem__)[:2]:
            all_steps = [self.steps(name, batch, lr, seed) for seed in range(num_seeds)]
            if None not in all_steps:
                means[lr] = fmean(steps for steps in all_steps if steps is not None)
        if not means:
            return None
        best = min(means, key=means.__getitem__)
        return best, means[best]

    def _take(
        self, name: str, batch: int, lr: float, seed: int, *, with_noise: bool
    ) -> dict[str, Any]:
        key = f"{name} {batch} {lr:.6g} {seed}{' noise' if with_noise else ''}"
        if key not in self._results:
            self._results[key] = self._train(RACES[name], batch, lr, seed, with_noise=with_noise)
            if self._cache is not None:
                write_json(self._cache, self._results)
        result: dict[str, Any] = self._results[key]
        return result

    def _train(
        self, race: Race, batch: int, lr: float, seed: int, *, with_noise: bool
    ) -> dict[str, Any]:
        steps = int(race.steps * (self._first / batch) ** 0.5)
        recipe = replace(
            CASES[race.recipe].recipe,
            schedule=constant(),
            batch_size=batch,
            micro_batch_size=batch // _PARTS if with_noise else batch,
            noise_scale=with_noise,
            lr=lr,
            seed=seed,
            steps=steps,
            evaluate_every=max(steps // _EVALUATIONS, 1),
        )
        plan = make_plan(recipe, self._machine, nproc_per_node=1)
        torch.set_num_threads(1)
        collector = _Collector()
        backend = LocalBackend(recipe, plan)
        context = build_context(recipe, plan, backend, last_step=steps, noise_stride=1)
        train(context, collector, _StopAtLoss(collector, race.loss))
        result: dict[str, Any] = {"steps": _crossing(collector.evaluations, race.loss)}
        if with_noise:
            result["noise"] = [asdict(measurement) for measurement in collector.noise]
            result["momentum"] = fmean(row.momentum or 0.0 for row in collector.rows)
        return result


def _crossing(evaluations: list[tuple[int, float]], target: float) -> float | None:
    """Return the step at which the loss reaches the target, interpolated linearly."""
    before = None
    for step, loss in evaluations:
        if loss <= target:
            if before is None:
                return float(step)
            return before[0] + (before[1] - target) / (before[1] - loss) * (step - before[0])
        before = (step, loss)
    return None


@benchmark
@click.option("--only", type=Names(RACES), default=",".join(RACES), help="Recipes; default: all.")
@click.option("--batches", type=Numbers(int, 8), default="64,128,256,512,1024", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), help="Cache finished trainings in FILE.")
def main(only: list[str], batches: list[int], seeds: int, cache: Path | None) -> None:
    """Print times fewer steps at each batch size, as measured and as forecast, for each recipe."""
    races = Races(cache, batches[0])
    head = ["recipe", "momentum", "B_simple", "B_crit", "fitted"]
    head += [f"{batch / batches[0]:g} x" for batch in batches[1:]]
    print_table(head, (compare(name, races, batches, seeds) for name in only))


def compare(name: str, races: Races, batches: list[int], seeds: int) -> list[Cell]:
    """Return a row of the table: the noise scale, and (measured, forecast, error) by batch."""
    found = {batch: best for batch in batches if (best := races.best(name, batch, seeds))}
    if len(found) < 2 or batches[0] not in found:
        raise click.ClickException(f"{name} reaches its loss at fewer than two batch sizes.")
    first = batches[0]
    measurements, momentum = races.noise(name, found[first][0])
    half = estimate_noise_scale(measurements[len(measurements) // 2 :])
    scale = half or estimate_noise_scale(measurements)
    if scale is None:
        raise click.ClickException(f"The noise scale of {name} is undetermined.")
    b_simple = scale.b_simple * first / fmean(each.big_items for each in measurements)
    critical = critical_batch(b_simple, momentum)
    _, fitted = fit_steps(list(found), [steps for _, steps in found.values()])
    row: list[Cell] = [name, (momentum, ".2g"), (b_simple, ",.0f"), (critical, ",.0f")]
    row.append((fitted, ",.0f"))
    for batch in batches[1:]:
        if batch not in found:
            row.append("not reached")
            continue
        measured = found[first][1] / found[batch][1]
        forecast = 1 / steps_ratio(first, batch, critical)
        row.append(f"{measured:.2f}, {forecast:.2f}, {forecast / measured - 1:+.0%}")
    return row


if __name__ == "__main__":
    main()
