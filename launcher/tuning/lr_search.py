"""The learning rate, by a range test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from launcher.analysis.lr_curve import (
    FoundLR,
    LossCurve,
    LRTrial,
    at_reference,
    final_loss,
    next_lr,
    suggest,
)
from launcher.launch.signal_handler import SignalHandler
from launcher.recipe.recipe import Recipe
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.tuning.probe_run import Probe, Target, run_probe


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


def find_lr(
    test: Probe, run_dir: RunDir, signals: SignalHandler, *, quiet: bool = False
) -> FoundLR:
    """Run a range test; return what it came to.

    Raises:
        EndedError: It failed or was stopped, which was shown.
    """
    curve = _curve(test, run_dir, signals, quiet=quiet)
    return FoundLR(curve=curve, suggestions=suggest(curve))


def try_lrs(
    found: FoundLR,
    target: Target,
    run_dir: RunDir,
    signals: SignalHandler,
    tell: Callable[[LRTrial], None],
    *,
    steps: int,
) -> FoundLR:
    """Return what was found with short trainings at the valley and around it.

    Each is a whole training in so many steps: the recipe's own schedule, from one end to the other.

    Args:
        found: By a range test.
        target: The recipe.
        run_dir: A folder for each training is made in it.
        signals: What has been listening for signals.
        tell: Hears of each training.
        steps: Of each training.

    Raises:
        EndedError: One failed or was stopped, which was shown.
    """
    trials: list[LRTrial] = []
    first = found.suggestions.valley
    while first is not None and (lr := next_lr(trials, first)) is not None:
        probe = target.having(
            "find lr",
            lr=lr,
            lr_rule="none",
            steps=steps,
            max_bad_steps=steps,
            batch_milestones=(),
            record_samples=False,
            noise_scale=False,
        ).probe()
        folder = create_run_dir(run_dir.path / f"lr-{lr:.3g}", probe.plan.recipe)
        losses = _curve(probe, folder, signals, quiet=True).losses
        trials.append(LRTrial(lr=lr, loss=final_loss(losses, steps)))
        tell(trials[-1])
    return replace(found, trials=tuple(trials))


def _curve(probe: Probe, run_dir: RunDir, signals: SignalHandler, *, quiet: bool) -> LossCurve:
    """Train along the schedule of a probe until the loss diverges."""
    from launcher.engine.worker import agent_range_test

    run_probe(probe, run_dir, agent_range_test, signals, quiet=quiet)
    values = json.loads(run_dir.curve.read_text(encoding="utf-8"))
    return LossCurve(lrs=tuple(values["lrs"]), losses=tuple(values["losses"]))


def stated(lr: float, batch_size: int, recipe: Recipe) -> dict[str, float]:
    """Return the settings of a recipe by which a plan gives this learning rate at `batch_size`."""
    settings = {"lr": at_reference(lr, batch_size, recipe.lr_batch_size, recipe.lr_rule)}
    if recipe.lr_rule != "none" and recipe.lr_batch_size is None:
        settings["lr_batch_size"] = batch_size
    return settings
