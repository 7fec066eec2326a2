"""The learning rate, by a range test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.find.probe import Probe, plan_probe, run_probe
from launcher.finders.lr import Curve, Suggestions, at_reference, suggest
from launcher.launch import Stops
from launcher.machine import Machine
from launcher.overrides import Override, build
from launcher.resolve import Reference
from launcher.rundir import RunDir


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
) -> Probe:
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
    return plan_probe(
        reference,
        overrides,
        machine,
        nproc_per_node=nproc_per_node,
        settings=settings,
        source="find lr",
    )


def find_lr(test: Probe, run_dir: RunDir, stops: Stops, *, quiet: bool = False) -> FoundLR | int:
    """Run a range test; return what it came to, or the exit code if it failed."""
    from launcher.engine.worker import launched_range_test

    code = run_probe(test, run_dir, launched_range_test, stops, quiet=quiet)
    if code:
        return code
    values = json.loads(run_dir.curve.read_text(encoding="utf-8"))
    curve = Curve(lrs=tuple(values["lrs"]), losses=tuple(values["losses"]))
    return FoundLR(curve=curve, suggestions=suggest(curve))


def stated(
    lr: float, batch_size: int, reference: Reference, overrides: Sequence[Override]
) -> dict[str, float]:
    """Return the settings of a recipe by which a plan gives this learning rate at `batch_size`."""
    recipe = build(reference, overrides).recipe
    settings = {"lr": at_reference(lr, batch_size, recipe.lr_batch_size, recipe.lr_rule)}
    if recipe.lr_rule != "none" and recipe.lr_batch_size is None:
        settings["lr_batch_size"] = batch_size
    return settings
