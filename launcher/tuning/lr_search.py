"""The search for a learning rate: a range test, and short trainings around its lowest loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from launcher.analysis.lr_curve import LossCurve, lowest_lr, lr_at_reference
from launcher.analysis.lr_trials import (
    LRSearchResult,
    LRTrial,
    Suggestions,
    fitted_lr,
    for_length,
    training_name,
)
from launcher.errors import PlanError
from launcher.json_file import exact_floats
from launcher.launch.signal_handler import SignalHandler
from launcher.paths import is_file
from launcher.recipe.recipe import Recipe
from launcher.runs.files import write_json
from launcher.runs.run_record import write_run
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.tuning.measured_files import read_curve, read_trials
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


def scale_lrs(result: LRSearchResult, factor: float) -> LRSearchResult:
    """Return the result of a range test with all learning rates multiplied by a factor."""
    lowest = result.suggestions.lowest
    return replace(
        result,
        curve=replace(result.curve, lrs=tuple(lr * factor for lr in result.curve.lrs)),
        suggestions=replace(result.suggestions, lowest=None if lowest is None else lowest * factor),
    )


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
    same samples. The same ranks take all of them. If the range test suggests nothing there are no
    trainings.

    Args:
        result: Result of the range test.
        target: The recipe.
        run_dir: Folder that receives the folder `trainings`, with a folder for each of them.
        signals: The signal handler of this process.
        on_trial: Receives the outcome at each learning rate.
        steps: Steps of a short training; at most those of the recipe are taken.

    Raises:
        RunFailedError: A rank failed.
    """
    first = result.suggestions.lowest
    if first is None:
        return result
    whole_steps = target.plan()[1].total_steps
    steps = min(steps, whole_steps)
    probe = _plan_training(target, first, steps)
    trials = _Trials(create_run_dir(run_dir.path / "trainings", probe.plan.recipe), on_trial)
    from launcher.engine.worker import agent_lr_trainings

    try:
        run_probe(
            probe,
            trials.run_dir,
            agent_lr_trainings,
            signals,
            quiet=True,
            while_running=trials.report,
        )
    finally:
        trials.report()
    for trial in trials.reported:
        folder = RunDir(trials.run_dir.path / training_name(trial.lr))
        if is_file(folder.curve):
            planned = _plan_training(target, trial.lr, steps)
            write_run(folder, replace(planned.description, probe=True))
    result = with_trials(result, trials.reported, steps, whole_steps)
    _store(result, run_dir)
    return result


class _Trials:
    """Reports the outcomes that the ranks write while they train.

    Args:
        run_dir: Folder of the trainings.
        on_trial: Receives each outcome once.
    """

    def __init__(self, run_dir: RunDir, on_trial: Callable[[LRTrial], None]) -> None:
        self.run_dir, self._on_trial = run_dir, on_trial
        self.reported: list[LRTrial] = []
        """The outcomes so far, in their order."""

        self._state: os.stat_result | None = None

    def report(self) -> None:
        """Report the outcomes that were written since the last call."""
        try:
            state = self.run_dir.trials.stat()
        except OSError:  # there is none yet
            return
        before, self._state = self._state, state
        if before is not None and (before.st_ino, before.st_mtime_ns) == (
            state.st_ino,
            state.st_mtime_ns,
        ):
            return
        for trial in read_trials(self.run_dir)[len(self.reported) :]:
            self.reported.append(trial)
            self._on_trial(trial)


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


def _plan_training(target: Target, lr: float, steps: int) -> Probe:
    """Plan a training through the whole schedule of a recipe.

    Args:
        target: The recipe.
        lr: Peak learning rate.
        steps: Steps of the training.

    Raises:
        PlanError: The recipe cannot be trained with these settings on these ranks.
    """
    return target.with_settings(
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
