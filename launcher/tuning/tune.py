"""The tuning of a recipe: all searches in sequence, each with what the earlier ones found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from launcher.analysis.batch_sizes import choose_size, fastest_to_the_loss
from launcher.analysis.gradient_noise import MAX_BATCH_RATIO, items_ratio, steps_ratio
from launcher.analysis.lr_trials import LRSearchResult
from launcher.errors import PlanError
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.planning.stages import lr_factor
from launcher.recipe.recipe import Recipe
from launcher.runs.rundir import RunDir
from launcher.tuning.batch_search import BatchSearch, BatchSearchResult
from launcher.tuning.loader_search import LoaderSearch, LoaderSearchResult
from launcher.tuning.lr_search import find_lr, plan_range_test, scale_lrs, try_lrs
from launcher.tuning.noise_search import NoiseSearchResult, find_noise, plan_noise
from launcher.tuning.probe_run import Probe, Target
from launcher.tuning.summaries import lr_confidence
from launcher.tuning.tuning_folder import read_result, store_result
from launcher.tuning.tuning_result import TunedSetting, TuningListener, TuningResult

LOWEST_LR, HIGHEST_LR = 1e-6, 10.0
"""The learning rates of the first and the last step of a range test."""

_MIN_STEPS_PER_EPOCH = 4
"""A global batch may grow until an epoch has this many steps."""

_FIRST_SIZE_DIVISOR = 4
"""The first timed micro-batch is a rank's share of the recipe's batch divided by this."""

_CAUTION = 2.0
"""The gradient noise is measured below the learning rate of a range test's lowest loss, divided by
this: a whole training may diverge at that learning rate."""

T = TypeVar("T")


class Tuner:
    """A search for the settings that a recipe's overrides leave open.

    The settings are the learning rate, the global batch and micro-batch, and the DataLoader
    workers. The tuner prints nothing: it calls a listener and returns a `TuningResult`. The result
    of each search is stored in the folder, so that another tuner continues where one stopped.

    Args:
        target: The recipe. Settings that its overrides set do not change.
        run_dir: Folder of the tuning, from `open_tuning`.
        signals: The signal handler of this process.
        listener: Receives what the tuner does and finds.
        memory: Memory of each rank in bytes; None is its GPU's memory, or its part of the free
            host memory.
        steps: Steps of a range test, of a short training, and of the measurement of noise.
        seconds: Duration of each measurement of DataLoader workers.
    """

    def __init__(
        self,
        target: Target,
        run_dir: RunDir,
        signals: SignalHandler,
        listener: TuningListener,
        *,
        memory: int | None,
        steps: int,
        seconds: float,
    ) -> None:
        self._target, self._run_dir, self._signals = target, run_dir, signals
        self._listener = listener
        self._memory, self._steps, self._seconds = memory, steps, seconds
        self._fixed_names = {override.name for override in target.overrides}
        self._settings: dict[str, TunedSetting] = {}

    def run(self) -> TuningResult:
        """Run all searches and return what they found.

        Raises:
            PlanError: The recipe cannot be trained with these settings on these ranks.
            RunFailedError: A rank failed.
            TrainingError: A trial of a micro-batch size failed for a reason other than memory.
            RunDirError: A stored result is damaged.
        """
        range_test = self._test_lrs()
        noise, critical = self._find_noise()
        batch = self._find_batch(critical)
        lr_search = None if range_test is None else self._find_lr(*range_test)
        loader = self._find_loader()
        return TuningResult(
            settings=tuple(self._settings.values()),
            lr_search=lr_search,
            noise=noise,
            critical_batch=critical,
            batch=batch,
            loader=loader,
        )

    def _tuned_target(self) -> Target:
        """Return the recipe with the settings found so far."""
        values = {name: setting.value for name, setting in self._settings.items()}
        return self._target.with_settings("tune", **values)

    def _set(self, name: str, value: Any, evidence: str) -> None:
        """Recommend a setting, in place of an earlier recommendation."""
        self._settings[name] = TunedSetting(name=name, value=value, evidence=evidence)

    def _search_once(self, name: str, kind: type[T], search: Callable[[RunDir], T]) -> T:
        """Return the stored result of a search, or run it and store its result."""
        result = read_result(self._run_dir, name, kind)
        if result is None:
            return store_result(self._run_dir, name, search)
        self._listener.on_message(
            f"Using {name}.json, which an earlier run of this command measured."
        )
        return result

    def _test_lrs(self) -> tuple[LRSearchResult, int] | None:
        """Run a range test; return its result and its global batch, or None if lr is fixed.

        What follows trains below the learning rate where its loss is lowest, which may diverge over
        a whole training.
        """
        if "lr" in self._fixed_names:
            return None
        recipe, plan = self._tuned_target().plan()
        self._listener.on_search(f"range test at a global batch of {plan.batch_size:,} samples")
        if str(recipe.schedule) == "constant()" and "schedule" not in self._fixed_names:
            evidence = "lr is the peak of a schedule that decays, and constant() does not decay"
            self._set("schedule", "one_cycle()", evidence)
        test = self._plan_test(self._tuned_target())
        result = self._search_once(
            "lr", LRSearchResult, lambda run_dir: find_lr(test, run_dir, self._signals)
        )
        if result.suggestions.lowest is not None:
            self._set_lr(result.suggestions.lowest / _CAUTION, recipe, plan, "a range test")
        return result, plan.batch_size

    def _plan_test(self, target: Target) -> Probe:
        return plan_range_test(target, lowest=LOWEST_LR, highest=HIGHEST_LR, steps=self._steps)

    def _set_lr(self, lr: float, recipe: Recipe, plan: Plan, evidence: str) -> None:
        """Recommend a learning rate at the global batch of a plan."""
        self._set("lr", lr, evidence)
        if recipe.lr_rule != "none":
            self._set("lr_batch_size", plan.batch_size, "the global batch of those trainings")

    def _find_lr(self, range_test: LRSearchResult, batch_size: int) -> LRSearchResult:
        """Search for the learning rate by short trainings at the global batch that was found.

        Args:
            range_test: The result of the range test.
            batch_size: The global batch of the range test, from which learning rates are scaled.
        """
        recipe, plan = self._tuned_target().plan()
        self._listener.on_search(f"learning rate at a global batch of {plan.batch_size:,} samples")
        scaled = scale_lrs(range_test, lr_factor(plan.batch_size / batch_size, recipe.lr_rule))
        if plan.batch_size != batch_size:
            self._listener.on_message(
                f"The range test had a global batch of {batch_size:,}; its learning rates are "
                f"scaled to {plan.batch_size:,} by lr_rule={recipe.lr_rule}."
            )
        for name in ("lr", "lr_batch_size"):  # what the range test has set
            self._settings.pop(name, None)
        target, on_trial = self._tuned_target(), self._listener.on_lr_trial
        result = self._search_once(
            "trainings",
            LRSearchResult,
            lambda run_dir: try_lrs(
                scaled, target, run_dir, self._signals, on_trial, steps=self._steps
            ),
        )
        self._listener.on_lr_result(result, self._plan_test(target))
        found = result.suggestions.trainings
        if found is None:
            reason = result.suggestions.reason or "all short trainings diverged"
            self._listener.on_message(f"No learning rate is recommended: {reason}.")
            return result
        lr = float(f"{found:.3g}")
        self._listener.on_message(f"The recommended learning rate is {lr:g}.")
        evidence = (
            f"the lowest final loss of short trainings at {len(result.trials)} learning rates "
            f"and a global batch of {plan.batch_size:,}; {lr_confidence('trainings', self._steps)}"
        )
        self._set_lr(lr, recipe, plan, evidence)
        return result

    def _find_noise(self) -> tuple[NoiseSearchResult | None, float | None]:
        """Measure the gradient noise; return the measurement and B_crit in samples."""
        self._listener.on_search("gradient noise scale")
        target = self._tuned_target()
        if target.plan()[1].total_steps > self._steps:
            # The noise scale grows as the loss falls, so a short training through the whole
            # schedule represents a long one better than its first steps do.
            target = target.with_settings("tune", steps=self._steps)
        try:
            probe = plan_noise(target)
        except PlanError as error:
            self._listener.on_message(f"The noise scale cannot be measured. {error}")
            return None, None
        result = self._search_once(
            "noise",
            NoiseSearchResult,
            lambda run_dir: find_noise(probe, run_dir, self._signals, steps=self._steps),
        )
        self._listener.on_noise_result(result, probe)
        if result.critical is None:
            num_steps = len(result.measurements)
            self._listener.on_message(f"The noise scale is undetermined after {num_steps} steps.")
            return result, None
        # A loss may count items other than samples, such as tokens.
        samples_per_item = probe.plan.batch_size / result.measurements[0].big_items
        critical = result.critical * samples_per_item
        self._listener.on_message(f"The critical batch B_crit is {critical:,.3g} samples.")
        return result, critical

    def _find_batch(self, critical: float | None) -> BatchSearchResult | None:
        """Search for the micro-batch and, given B_crit in samples, for the global batch.

        Return None if the micro-batch size is fixed.
        """
        if "micro_batch_size" in self._fixed_names:
            return None
        target = self._tuned_target()
        recipe, plan = target.plan()
        if self._is_batch_fixed(recipe):
            critical = None
        first = None
        if critical is None:
            self._listener.on_search("micro-batch")
        else:
            self._listener.on_search("batch and micro-batch")
            target = target.with_settings("tune", batch_size=_largest_batch(plan, critical))
            first = max(plan.batch_size // plan.data_ranks // _FIRST_SIZE_DIVISOR, 1)
        search = BatchSearch(target, memory=self._memory, first=first)
        result = self._search_once(
            "batch",
            BatchSearchResult,
            lambda run_dir: search.run(run_dir, self._signals, self._listener.on_size_trial),
        )
        self._listener.on_batch_result(result, search.plan)
        chosen = choose_size(result.trials)
        if chosen is None:
            self._listener.on_message("Not one sample fits into the memory of a rank.")
            return result
        if critical is not None:
            chosen = fastest_to_the_loss(
                result.trials,
                world_size=plan.data_ranks,
                batch_size=plan.batch_size,
                critical=critical,
            )
            self._set_batch(recipe, plan, chosen.size, critical)
        num_fitting = sum(trial.fits for trial in result.trials)
        self._set(
            "micro_batch_size",
            chosen.size,
            f"{chosen.samples_per_second:,.0f} samples/s; {num_fitting} of {len(result.trials)} "
            "sizes fit into memory",
        )
        return result

    def _set_batch(self, recipe: Recipe, plan: Plan, size: int, critical: float) -> None:
        """Recommend `size` samples per rank as the global batch, and a duration that fits it.

        Nothing is recommended if the global batch stays the same.
        """
        before, after = plan.batch_size, size * plan.data_ranks
        if after == before:
            return
        steps, items = steps_ratio(before, after, critical), items_ratio(before, after, critical)
        self._listener.on_message(
            f"The recommended global batch has {after:,} samples instead of {before:,}."
        )
        is_per_gpu = recipe.batch_size_per_gpu is not None
        self._set(
            "batch_size_per_gpu" if is_per_gpu else "batch_size",
            max(after // plan.world_size, 1) if is_per_gpu else after,
            f"the critical batch is {critical:,.3g} samples: x{steps:.2f} the steps and "
            f"x{items:.2f} the samples of a batch of {before:,}",
        )
        if self._fixed_names & {"epochs", "steps"}:
            return
        if recipe.epochs is not None:
            epochs = max(round(recipe.epochs * items), 1)
            self._set("epochs", epochs, f"{recipe.epochs} x {items:.2f}, for the same loss")
        else:
            assert recipe.steps is not None
            num_steps = max(round(recipe.steps * steps), 1)
            self._set("steps", num_steps, f"{recipe.steps:,} x {steps:.2f}, for the same loss")

    def _find_loader(self) -> LoaderSearchResult | None:
        """Search for the DataLoader settings; return None if the number of workers is fixed."""
        if "num_workers" in self._fixed_names or self._tuned_target().plan()[0].data_on_device:
            return None
        self._listener.on_search("DataLoader workers")
        search = LoaderSearch(self._tuned_target(), seconds=self._seconds)
        result = self._search_once(
            "loader",
            LoaderSearchResult,
            lambda run_dir: search.run(run_dir, self._signals, self._listener.on_loader_trial),
        )
        self._listener.on_loader_result(result, search.plan)
        planned = next(reading for reading in result.readings if reading.workers == result.planned)
        evidence = (
            f"{result.best.samples_per_second:,.0f} samples/s, and "
            f"{planned.samples_per_second:,.0f} with the planned num_workers={result.planned}"
        )
        for name, value in result.settings.items():
            if name not in self._fixed_names:
                self._set(name, value, evidence)
        return result

    def _is_batch_fixed(self, recipe: Recipe) -> bool:
        """Return whether overrides or stages determine the global batch."""
        is_given = self._fixed_names & {"batch_size", "batch_size_per_gpu"}
        return bool(is_given or recipe.batch_milestones)


def _largest_batch(plan: Plan, critical: float) -> int:
    """Return the global batch, doubled as often as the critical batch and the data allow.

    Args:
        plan: The plan with the present batch.
        critical: B_crit, in samples.
    """
    limit = MAX_BATCH_RATIO * critical
    limit = min(limit, (plan.train_samples or limit) / _MIN_STEPS_PER_EPOCH)
    batch_size = plan.batch_size
    while 2 * batch_size <= limit:
        batch_size *= 2
    return batch_size
