"""Measuring on the planned ranks what a recipe should be set to.

Each finder trains a recipe for a while, with the loop's own step, in a run folder of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.finders.lr import Curve, Suggestions, at_reference, suggest
from launcher.job import Job, describe_run, plan_recipe
from launcher.launch import Stops, launch
from launcher.machine import Machine
from launcher.overrides import Override, build
from launcher.plan import Plan
from launcher.recipe import Recipe
from launcher.resolve import Reference
from launcher.rundir import RunDir, write_yaml


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """A learning-rate range test, planned."""

    reference: Reference
    overrides: tuple[Override, ...]
    """Those of the recipe and those that make it a range test."""

    recipe: Recipe
    """What the learning rate is looked for."""

    plan: Plan
    """Of the test."""

    description: dict[str, object]
    """For run.yaml."""


@dataclass(frozen=True, kw_only=True)
class FoundLR:
    """What a range test came to."""

    curve: Curve
    suggestions: Suggestions
    """At the batch of the test."""


def plan_range_test(
    reference: Reference,
    overrides: Sequence[Override],
    machine: Machine,
    *,
    nproc_per_node: int | None,
    lowest: float,
    highest: float,
    steps: int,
) -> RangeTest:
    """Plan a range test at the recipe's global batch, on the ranks that it would be trained on.

    Raises:
        PlanError: The recipe cannot be trained like that.
    """
    settings = {
        "lr": highest,
        "lr_rule": "none",
        "schedule": f"exponential(initial_factor={lowest / highest!r})",
        "steps": steps,
        "max_bad_steps": steps,
        "record_samples": False,
    }
    own = [Override(name=name, value=value, source="find lr") for name, value in settings.items()]
    given = (*overrides, *own)
    built, plan = plan_recipe(reference, given, machine, nproc_per_node=nproc_per_node)
    return RangeTest(
        reference=reference,
        overrides=given,
        recipe=build(reference, overrides).recipe,
        plan=plan,
        description=describe_run(reference, built, plan),
    )


def find_lr(
    test: RangeTest, run_dir: RunDir, stops: Stops, *, quiet: bool = False
) -> FoundLR | int:
    """Run a range test; return what it came to, or the exit code if it failed."""
    write_yaml(run_dir.run_yaml, test.description)
    from launcher.engine.worker import launched_range_test

    job = Job(
        recipe=test.reference.location,
        overrides=test.overrides,
        plan=test.plan,
        run_dir=run_dir,
        launcher_pid=os.getpid(),
        quiet=quiet,
    )
    code = launch(job, launched_range_test, stops=stops)
    if code:
        return code
    values = json.loads(run_dir.curve.read_text(encoding="utf-8"))
    curve = Curve(lrs=tuple(values["lrs"]), losses=tuple(values["losses"]))
    return FoundLR(curve=curve, suggestions=suggest(curve))


def stated(lr: float, test: RangeTest) -> dict[str, float]:
    """Return the settings by which a plan gives this learning rate at the batch of the test."""
    recipe, batch_size = test.recipe, test.plan.batch_size
    settings = {"lr": at_reference(lr, batch_size, recipe.lr_batch_size, recipe.lr_rule)}
    if recipe.lr_rule != "none" and recipe.lr_batch_size is None:
        settings["lr_batch_size"] = batch_size
    return settings
