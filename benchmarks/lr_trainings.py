"""Cached trainings of the recipes in lr_recipes.py, in this process and on one thread."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from lr_recipes import Case

from launcher import make_plan, read_machine
from launcher.engine.backends.local import LocalBackend
from launcher.engine.metrics.meter import RankFlags
from launcher.engine.probes.measuring import MetricsCollector
from launcher.engine.training.build import build_context
from launcher.engine.training.context import StepController
from launcher.engine.training.loop import train
from launcher.recipe.recipe import Recipe
from launcher.recipe.schedules import exponential
from launcher.runs.files import write_json


class Training(NamedTuple):
    """The losses of one training."""

    held_out: float | None
    """Mean loss over the evaluation set at the end; None if it is not finite."""

    losses: list[float]
    """Loss of the global batch at each step, up to the first that is not finite; empty for whole
    trainings."""


class CachedTrainings:
    """Trains recipes and caches the results, so that an interrupted benchmark can continue.

    Args:
        cache: JSON file with the results, read if it exists; None caches in memory only.
    """

    def __init__(self, cache: Path | None) -> None:
        self._cache = cache
        values = json.loads(cache.read_text()) if cache and cache.is_file() else {}
        self._results = {key: Training(*value) for key, value in values.items()}
        self._machine = read_machine()

    def whole(self, case: Case, lr: float, seed: int) -> float:
        """Return the final held-out loss of a whole training; infinite if it diverged."""
        assert case.recipe.steps is not None
        key = f"{case.recipe.name} whole {case.recipe.steps} {lr:.6g} {seed}"
        recipe = replace(case.recipe, lr=lr, seed=seed)
        held_out = self._take(key, recipe, keeps_losses=False).held_out
        return math.inf if held_out is None else held_out

    def short(self, case: Case, lr: float, steps: int, seed: int) -> Training:
        """Return a training through the whole schedule in a few steps."""
        key = f"{case.recipe.name} short {steps} {lr:.6g} {seed}"
        return self._take(key, replace(case.recipe, lr=lr, seed=seed, steps=steps))

    def range_test(
        self, case: Case, lowest: float, highest: float, steps: int, seed: int
    ) -> Training:
        """Return a training in which the learning rate rises exponentially."""
        key = f"{case.recipe.name} range {lowest:g} {highest:g} {steps} {seed}"
        schedule = exponential(initial_factor=lowest / highest)
        recipe = replace(case.recipe, lr=highest, seed=seed, steps=steps, schedule=schedule)
        return self._take(key, recipe)

    def _take(self, key: str, recipe: Recipe, *, keeps_losses: bool = True) -> Training:
        if key not in self._results:
            training = self._train(recipe)
            self._results[key] = training if keeps_losses else training._replace(losses=[])
            if self._cache is not None:
                write_json(self._cache, self._results)
        return self._results[key]

    def _train(self, recipe: Recipe) -> Training:
        plan = make_plan(recipe, self._machine, nproc_per_node=1)
        torch.set_num_threads(1)
        collector = MetricsCollector(None)
        backend = LocalBackend(recipe, plan)
        context = build_context(recipe, plan, backend, last_step=plan.total_steps)
        outcome = train(context, collector, _StopAtNaN(collector))
        held_out = outcome.evaluation.get("loss", math.nan)
        losses = itertools.takewhile(math.isfinite, (row.loss for row in collector.rows))
        return Training(
            held_out if math.isfinite(held_out) else None,
            [float(f"{loss:.5g}") for loss in losses],
        )


class _StopAtNaN(StepController):
    """Stops at a loss that is not finite.

    Args:
        collector: Receives the losses.
    """

    def __init__(self, collector: MetricsCollector) -> None:
        self._collector = collector

    def on_step_end(self, step: int, flags: RankFlags) -> bool:
        rows = self._collector.rows
        return bool(rows) and not math.isfinite(rows[-1].loss)
