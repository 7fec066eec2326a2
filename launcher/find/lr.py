"""The learning rate, by a range test."""

from __future__ import annotations

import json
from dataclasses import dataclass

from launcher.find.probe import Probe, Target, run_probe
from launcher.finders.lr import Curve, Suggestions, at_reference, suggest
from launcher.launch import Stops
from launcher.recipe import Recipe
from launcher.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class FoundLR:
    """What a range test came to."""

    curve: Curve
    suggestions: Suggestions
    """At the batch of the test."""


def plan_range_test(target: Target, *, lowest: float, highest: float, steps: int) -> Probe:
    """Plan a range test at the recipe's global batch.

    Raises:
        PlanError: The recipe cannot be trained like that.
    """
    return target.having(
        "find lr",
        lr=highest,
        lr_rule="none",
        schedule=f"exponential(initial_factor={lowest / highest!r})",
        steps=steps,
        max_bad_steps=steps,
        batch_milestones=(),
        record_samples=False,
        noise_scale=False,
    ).probe()


def find_lr(test: Probe, run_dir: RunDir, stops: Stops, *, quiet: bool = False) -> FoundLR:
    """Run a range test; return what it came to.

    Raises:
        EndedError: It failed or was stopped, which was shown.
    """
    from launcher.engine.worker import launched_range_test

    run_probe(test, run_dir, launched_range_test, stops, quiet=quiet)
    values = json.loads(run_dir.curve.read_text(encoding="utf-8"))
    curve = Curve(lrs=tuple(values["lrs"]), losses=tuple(values["losses"]))
    return FoundLR(curve=curve, suggestions=suggest(curve))


def stated(lr: float, batch_size: int, recipe: Recipe) -> dict[str, float]:
    """Return the settings of a recipe by which a plan gives this learning rate at `batch_size`."""
    settings = {"lr": at_reference(lr, batch_size, recipe.lr_batch_size, recipe.lr_rule)}
    if recipe.lr_rule != "none" and recipe.lr_batch_size is None:
        settings["lr_batch_size"] = batch_size
    return settings
