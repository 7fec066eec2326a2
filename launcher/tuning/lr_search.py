"""The search for a learning rate: a range test, and short trainings around its lowest loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from launcher.analysis.lr_curve import LossCurve, lowest_lr, lr_at_reference
from launcher.analysis.lr_trials import (
    LRSearchResult,
    LRTrial,
    Suggestions,
    final_loss,
    fitted_lr,
    for_length,
    next_lr,
)
from launcher.errors import PlanError
from launcher.json_file import exact_floats
from launcher.launch.signal_handler import SignalHandler
from launcher.recipe.recipe import Recipe
from launcher.runs.files import write_json
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.tuning.measured_files import read_curve
from launcher.tuning.probe_run import Probe, Target, run_probe


def plan_range_test(target: Target, *, lowest: float, highest: float, steps: int) -> Probe:
    """Plan a range test at the recipe's global batch.

    Args:
        target: The recipe.
        lowest: Learning rate of the first step.
        highest: Learning rate of the last step.
        steps: Number of steps, between which the learning rate rises exponentially.

    Raises:
        PlanError: The recipe cannot be trained with these settings on these ranks, or has several
            objectives.
    """
    recipe, _ = target.plan()
    if recipe.objectives:
        names = " and ".join(objective.name for objective in recipe.objectives)
        raise PlanError(
            f"A range test raises one learning rate until one loss diverges, and {recipe.name} has "
            f"the objectives {names}, each with a learning rate and a loss of its own. Compare "
            "short trainings with `launcher run` instead, and give lr=... where a command asks for "
            "it."
        )
    return target.with_settings(
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
) -> LRSearchResult:
    """Run a range test and return its curve with the learning rate of its lowest loss.

    Args:
        test: The range test, from `plan_range_test`.
        run_dir: Folder of the test.
        signals: The signal handler of this process.
        quiet: Whether the ranks write only to their logs.

    Raises:
        RunFailedError: A rank failed.
    """
    from launcher.engine.worker import agent_range_test

    run_probe(test, run_dir, agent_range_test, signals, quiet=quiet)
    result = read_range_test(read_curve(run_dir))
    _store(result, run_dir)
    return result


def read_range_test(curve: LossCurve) -> LRSearchResult:
    """Return the result of a range test with this curve."""
    lowest, reason = lowest_lr(curve)
    return LRSearchResult(curve=curve, suggestions=Suggestions(lowest=lowest, reason=reason))


def try_lrs(
    result: LRSearchResult,
    target: Target,
    run_dir: RunDir,
    signals: SignalHandler,
    on_trial: Callable[[LRTrial], None],
    *,
    steps: int,
) -> LRSearchResult:
    """Return the result of a range test with short trainings around its lowest loss.

    Each training goes through the whole schedule of the recipe, from the same weights and with the
    same samples. If the range test suggests nothing there are no trainings.

    Args:
        result: Result of the range test.
        target: The recipe.
        run_dir: Folder that receives a folder for each training.
        signals: The signal handler of this process.
        on_trial: Receives the outcome at each learning rate.
        steps: Steps of a short training; at most those of the recipe are taken.

    Raises:
        RunFailedError: A rank failed.
    """
    whole_steps = target.plan()[1].total_steps
    steps = min(steps, whole_steps)
    trials: list[LRTrial] = []
    first = result.suggestions.lowest
    while first is not None and (lr := next_lr(trials, first)) is not None:
        trials.append(LRTrial(lr=lr, loss=_try_lr(lr, target, run_dir, signals, steps)))
        on_trial(trials[-1])
    result = with_trials(result, trials, steps, whole_steps)
    _store(result, run_dir)
    return result


def with_trials(
    result: LRSearchResult, trials: Sequence[LRTrial], steps: int, whole_steps: int
) -> LRSearchResult:
    """Return the result of a range test with what short trainings add to it.

    Args:
        result: Result of the range test.
        trials: Outcomes of the short trainings; may be empty.
        steps: Optimizer steps of each.
        whole_steps: Optimizer steps of the recipe.
    """
    if not trials:
        return result
    found = fitted_lr(trials)
    if found is not None:
        found = for_length(found, steps, whole_steps)
    return replace(
        result,
        suggestions=replace(result.suggestions, trainings=found),
        trials=tuple(trials),
        trial_steps=steps,
        whole_steps=whole_steps,
    )


def _store(result: LRSearchResult, run_dir: RunDir) -> None:
    """Write the result of a search into its folder, for pages."""
    write_json(run_dir.lr_search, exact_floats(asdict(result)))


def _try_lr(
    lr: float, target: Target, run_dir: RunDir, signals: SignalHandler, steps: int
) -> float | None:
    """Train at one learning rate; return the final loss, or None if it diverged.

    Args:
        lr: Peak learning rate.
        target: The recipe.
        run_dir: Folder that receives the folder of the training.
        signals: The signal handler of this process.
        steps: Steps of the training.
    """
    from launcher.engine.worker import agent_short_training

    probe = target.with_settings(
        "find lr",
        lr=lr,
        lr_rule="none",
        steps=steps,
        max_bad_steps=steps,
        evaluate_every=steps,
        batch_milestones=(),
        record_samples=False,
        noise_scale=False,
    ).probe()
    trial_dir = create_run_dir(run_dir.path / f"lr-{lr:.3g}", probe.plan.recipe)
    run_probe(probe, trial_dir, agent_short_training, signals, quiet=True)
    return final_loss(read_curve(trial_dir), steps)


def recipe_lr_settings(lr: float, batch_size: int, recipe: Recipe) -> dict[str, float]:
    """Return the settings with which the plan of a recipe has a learning rate at a global batch.

    Args:
        lr: The learning rate to use at `batch_size`.
        batch_size: Global batch, in samples.
        recipe: The recipe, whose `lr_rule` and `lr_batch_size` scale its `lr`.

    Returns:
        `lr`, and `lr_batch_size` if the recipe scales the learning rate without stating it.
    """
    settings = {"lr": lr_at_reference(lr, batch_size, recipe.lr_batch_size, recipe.lr_rule)}
    if recipe.lr_rule != "none" and recipe.lr_batch_size is None:
        settings["lr_batch_size"] = batch_size
    return settings
