"""Measuring on the planned ranks what a recipe should be set to.

Each finder trains a recipe for a while, with the loop's own step, in a run folder of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.batch import ceil_div
from launcher.finders.lr import Curve, Suggestions, at_reference, suggest
from launcher.finders.noise import Measurement, NoiseScale, estimate
from launcher.job import Job, describe_run, plan_recipe
from launcher.launch import Stops, launch
from launcher.machine import Machine
from launcher.overrides import Override, build
from launcher.plan import Plan
from launcher.recipe import Recipe
from launcher.resolve import Reference
from launcher.rundir import RunDir, write_yaml

_PARTS = 4
"""A batch is measured in so many parts at least: with more of them fewer steps say as much."""


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


@dataclass(frozen=True, kw_only=True)
class NoiseProbe:
    """A stretch of training in which the gradient noise is measured, planned."""

    reference: Reference
    overrides: tuple[Override, ...]
    plan: Plan
    last_step: int
    description: dict[str, object]
    """For run.yaml."""

    counts_samples: bool
    """Whether the loss counts samples; otherwise it counts other items, such as tokens."""


@dataclass(frozen=True, kw_only=True)
class FoundNoise:
    """What was measured, and what it says; None where that is too little."""

    measurements: tuple[Measurement, ...]
    whole: NoiseScale | None
    halves: tuple[NoiseScale | None, NoiseScale | None]
    """Of the first and of the second half of the steps: it grows as the loss falls."""


def plan_noise(
    reference: Reference,
    overrides: Sequence[Override],
    machine: Machine,
    *,
    nproc_per_node: int | None,
    steps: int,
) -> NoiseProbe:
    """Plan the first steps of a recipe, in so many parts that their gradients can be compared.

    Raises:
        PlanError: The recipe cannot be trained like that.
    """
    built, plan = plan_recipe(reference, overrides, machine, nproc_per_node=nproc_per_node)
    share = max(plan.samples_per_rank)
    ranks = 1 if plan.backend == "fsdp" else plan.world_size  # it sums over them in every part
    micro_steps = max(ceil_div(_PARTS, ranks), plan.accumulation_steps)
    settings = {"noise_scale": True, "micro_batch_size": ceil_div(share, micro_steps)}
    own = [
        Override(name=name, value=value, source="find noise") for name, value in settings.items()
    ]
    given = (*overrides, *own)
    built, plan = plan_recipe(reference, given, machine, nproc_per_node=nproc_per_node)
    return NoiseProbe(
        reference=reference,
        overrides=given,
        plan=plan,
        last_step=min(steps, plan.total_steps),
        description=describe_run(reference, built, plan),
        counts_samples=built.recipe.count is None,
    )


def find_noise(
    probe: NoiseProbe, run_dir: RunDir, stops: Stops, *, quiet: bool = False
) -> FoundNoise | int:
    """Train and measure; return what it came to, or the exit code if it failed."""
    write_yaml(run_dir.run_yaml, probe.description)
    from launcher.engine.worker import launched_noise_probe

    job = Job(
        recipe=probe.reference.location,
        overrides=probe.overrides,
        plan=probe.plan,
        run_dir=run_dir,
        launcher_pid=os.getpid(),
        last_step=probe.last_step,
        quiet=quiet,
    )
    code = launch(job, launched_noise_probe, stops=stops)
    if code:
        return code
    values = json.loads(run_dir.noise.read_text(encoding="utf-8"))["measurements"]
    measured = tuple(Measurement(**each) for each in values)
    half = len(measured) // 2
    return FoundNoise(
        measurements=measured,
        whole=estimate(measured),
        halves=(estimate(measured[:half]), estimate(measured[half:])),
    )


def stated(lr: float, test: RangeTest) -> dict[str, float]:
    """Return the settings by which a plan gives this learning rate at the batch of the test."""
    recipe, batch_size = test.recipe, test.plan.batch_size
    settings = {"lr": at_reference(lr, batch_size, recipe.lr_batch_size, recipe.lr_rule)}
    if recipe.lr_rule != "none" and recipe.lr_batch_size is None:
        settings["lr_batch_size"] = batch_size
    return settings
