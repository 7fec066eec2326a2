"""A recipe, tuned: the finders one after the other, each with what those before it have found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from launcher.analysis.batch_sizes import SizeTrial, choose, fastest_to_the_loss
from launcher.analysis.gradient_noise import LARGEST, items_ratio, steps_ratio
from launcher.analysis.lr_curve import FoundLR, LRTrial, best_trial
from launcher.errors import PlanError, RunDirError
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe
from launcher.runs.rundir import RunDir, create_run_dir, write_json
from launcher.tuning.batch_search import BatchSearch, FoundBatch
from launcher.tuning.loader_search import FoundLoader, LoaderSearch, LoaderTrial
from launcher.tuning.lr_search import find_lr, plan_range_test, try_lrs
from launcher.tuning.noise_search import FoundNoise, find_noise, plan_noise
from launcher.tuning.probe_run import Probe, Target

LOWEST_LR, HIGHEST_LR = 1e-6, 10.0
"""Of a range test."""

_LEAST_STEPS = 4
"""Of an epoch: a batch is no larger part of the data than that leaves."""

_SMALLER = 4
"""The first batch that is timed is the recipe's divided by this."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TunedSetting:
    """A setting that was found."""

    name: str
    value: Any
    evidence: str
    """Why, in a line."""


class TuningListener(Protocol):
    """Hears how tuning goes on."""

    def begins(self, what: str) -> None:
        """This is looked for next."""

    def says(self, text: str) -> None:
        """This came of it, or is to be known."""

    def tried_lr(self, trial: LRTrial) -> None:
        """A learning rate was tried."""

    def tried(self, trial: SizeTrial) -> None:
        """A size was tried."""

    def read(self, reading: LoaderTrial) -> None:
        """A number of workers was measured."""

    def found_lr(self, found: FoundLR, test: Probe) -> None:
        """A range test has ended."""

    def found_noise(self, found: FoundNoise, probe: Probe) -> None:
        """The noise was measured."""

    def found_batch(self, found: FoundBatch, plan: Plan) -> None:
        """All sizes were tried."""

    def found_loader(self, found: FoundLoader, plan: Plan) -> None:
        """All numbers of workers were measured."""


class Tuner:
    """Finds what the user has left open: learning rate, batch, micro-batch, workers.

    What it has found is kept in the folder, so that a second one goes on where the first stopped.

    Args:
        target: The recipe; what its overrides set stays as it is.
        run_dir: Where to write.
        stops: What has been listening for signals.
        listener: Hears how it goes on.
        memory: Bytes for each rank; None is the memory of its GPU, or its part of what is free.
        steps: Of a range test, and of the measurement of noise.
        seconds: For how long each number of workers is measured.
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
        self._target, self._run_dir, self._stops = target, run_dir, signals
        self._listener = listener
        self._memory, self._steps, self._seconds = memory, steps, seconds
        self._given = {override.name for override in target.overrides}
        self._findings: dict[str, TunedSetting] = {}

    def run(self) -> list[TunedSetting]:
        """Return the settings that were found.

        Raises:
            PlanError: The recipe cannot be trained like that.
            EndedError: A training failed or was stopped, which was shown.
            TrainingError: A training failed while batches were tried.
        """
        _, before = self._now().plan()
        self._find_lr("lr")
        self._find_batch(self._find_noise())
        _, after = self._now().plan()
        if after.batch_size != before.batch_size:
            self._find_lr("lr-again")
        self._find_loader()
        return list(self._findings.values())

    def _now(self) -> Target:
        """Return the recipe with what was found so far."""
        found = {name: finding.value for name, finding in self._findings.items()}
        return self._target.having("tune", **found)

    def _add(self, name: str, value: Any, evidence: str) -> None:
        """Take note of a setting, in place of what was found for it before."""
        self._findings[name] = TunedSetting(name=name, value=value, evidence=evidence)

    def _once(self, name: str, kind: type[T], find: Callable[[RunDir], T]) -> T:
        """Return what was found before under this name, or find it in a folder of that name."""
        kept = self._run_dir.path / f"{name}.json"
        if kept.is_file():
            self._listener.says("found before")
            return _read(kept.read_text(encoding="utf-8"), kind, kept.name)
        folder = self._run_dir.path / name
        shutil.rmtree(folder, ignore_errors=True)  # of one that was stopped
        found = find(create_run_dir(folder, name))
        write_json(kept, asdict(found))  # type: ignore[call-overload]
        return found

    def _find_lr(self, name: str) -> None:
        if "lr" in self._given:
            return
        recipe, plan = self._now().plan()
        self._listener.begins(f"learning rate, at a batch of {plan.batch_size:,}")
        if str(recipe.schedule) == "constant()" and "schedule" not in self._given:
            why = "the lr is a peak to come down from, which constant() never does"
            self._add("schedule", "one_cycle()", why)
        now = self._now()
        test = plan_range_test(now, lowest=LOWEST_LR, highest=HIGHEST_LR, steps=self._steps)

        def find(run_dir: RunDir) -> FoundLR:
            found = find_lr(test, run_dir, self._stops)
            tell = self._listener.tried_lr
            return try_lrs(found, now, run_dir, self._stops, tell, steps=self._steps)

        found = self._once(name, FoundLR, find)
        self._listener.found_lr(found, test)
        best = best_trial(found.trials)
        if best is None:
            why = found.suggestions.reason or "all trainings diverged"
            self._listener.says(f"none is suggested: {why}")
            return
        lr = float(f"{best.lr:.3g}")
        self._listener.says(f"{lr:g}")
        self._add(
            "lr",
            lr,
            f"best of {len(found.trials)} whole trainings in {self._steps} steps of "
            f"{plan.batch_size:,} samples",
        )
        if recipe.lr_rule != "none":
            self._add("lr_batch_size", plan.batch_size, "the batch of those")

    def _find_noise(self) -> float | None:
        """Return the noise scale in samples, whatever items the loss counts, if it can be told."""
        self._listener.begins("gradient noise scale")
        now = self._now()
        if now.plan()[1].total_steps > self._steps:
            # A whole, short training, rather than the first steps of a long one: the noise scale
            # grows as the loss falls.
            now = now.having("tune", steps=self._steps)
        try:
            probe = plan_noise(now)
        except PlanError as error:
            self._listener.says(f"it cannot be measured: {error}")
            return None
        found = self._once(
            "noise",
            FoundNoise,
            lambda run_dir: find_noise(probe, run_dir, self._stops, steps=self._steps),
        )
        self._listener.found_noise(found, probe)
        if found.latest is None:
            self._listener.says("it cannot be told from so few steps")
            return None
        scale = found.latest.b_simple * probe.plan.batch_size / found.measurements[0].big_items
        self._listener.says(f"B_simple is {scale:,.3g} samples")
        return scale

    def _find_batch(self, scale: float | None) -> None:
        if "micro_batch_size" in self._given:
            return
        recipe, plan = self._now().plan()
        is_open = scale is not None and not self._keeps_batch(recipe)
        most = plan.batch_size
        if is_open:
            assert scale is not None
            limit = min(LARGEST * scale, (plan.train_samples or scale * LARGEST) / _LEAST_STEPS)
            while 2 * most <= limit:
                most *= 2
        self._listener.begins("batch and micro-batch" if is_open else "micro-batch")
        first = max(plan.batch_size // plan.world_size // _SMALLER, 1) if is_open else None
        search = BatchSearch(
            self._now().having("tune", batch_size=most) if is_open else self._now(),
            memory=self._memory,
            first=first,
        )
        found = self._once(
            "batch",
            FoundBatch,
            lambda run_dir: search.run(run_dir, self._stops, self._listener.tried),
        )
        self._listener.found_batch(found, search.plan)
        chosen = choose(found.trials)
        if is_open and chosen is not None:
            assert scale is not None
            chosen = fastest_to_the_loss(
                found.trials,
                world_size=plan.world_size,
                batch_size=plan.batch_size,
                noise_scale=scale,
            )
            self._take_batch(recipe, plan.batch_size, chosen.size, plan.world_size, scale)
        if chosen is None:
            self._listener.says("not one sample fits")
            return
        self._add(
            "micro_batch_size",
            chosen.size,
            f"{chosen.samples_per_second:,.0f} samples/s; "
            f"{sum(trial.fits for trial in found.trials)} of {len(found.trials)} sizes fit",
        )

    def _take_batch(
        self, recipe: Recipe, before: int, size: int, world_size: int, scale: float
    ) -> None:
        """Take note of another global batch, if it is one, and of what the run is then to take."""
        after = size * world_size
        if after == before:
            return
        steps, items = steps_ratio(before, after, scale), items_ratio(before, after, scale)
        self._listener.says(f"a batch of {after:,} instead of {before:,}")
        name, value = "batch_size", after
        if recipe.batch_size_per_gpu is not None:
            name, value = "batch_size_per_gpu", size
        self._add(
            name,
            value,
            f"noise scale {scale:,.3g}: x{steps:.2f} the steps, x{items:.2f} the samples of "
            f"{before:,}",
        )
        if self._given & {"epochs", "steps"}:
            return
        if recipe.epochs is not None:
            longer = max(round(recipe.epochs * items), 1)
            self._add("epochs", longer, f"{recipe.epochs} x {items:.2f}, to the same loss")
        else:
            assert recipe.steps is not None
            fewer = max(round(recipe.steps * steps), 1)
            self._add("steps", fewer, f"{recipe.steps:,} x {steps:.2f}, to the same loss")

    def _find_loader(self) -> None:
        if "num_workers" in self._given:
            return
        self._listener.begins("DataLoader workers")
        search = LoaderSearch(self._now(), seconds=self._seconds)
        found = self._once(
            "loader",
            FoundLoader,
            lambda run_dir: search.run(run_dir, self._stops, self._listener.read),
        )
        self._listener.found_loader(found, search.plan)
        planned = next(each for each in found.readings if each.workers == found.planned)
        rates = (found.best.samples_per_second, planned.samples_per_second)
        evidence = f"{rates[0]:,.0f} samples/s; {rates[1]:,.0f} with the planned {found.planned}"
        for name, value in found.settings.items():
            self._add(name, value, evidence)

    def _keeps_batch(self, recipe: Recipe) -> bool:
        """Return whether the global batch was decided by the user, or by stages."""
        given = self._given & {"batch_size", "batch_size_per_gpu"}
        return bool(given or recipe.batch_milestones)


def open_tuning(
    out: Path | None,
    target: Target,
    plan: Plan,
    *,
    memory: int | None,
    steps: int,
    seconds: float,
) -> RunDir:
    """Return a folder to tune in: a new one, or that of a tuning of the same that was stopped.

    Raises:
        RunDirError: It is something else's, or cannot be made.
    """
    asked = {
        "recipe": target.reference.location,
        "overrides": [[each.name, str(each.value)] for each in target.overrides],
        "ranks": [plan.device, plan.nodes, plan.nproc_per_node],
        "memory": memory,
        "steps": steps,
        "seconds": seconds,
    }
    kept = None if out is None else out / "asked.json"
    if kept is None or not kept.is_file():
        run_dir = create_run_dir(out, f"tune-{plan.recipe}")
        write_json(run_dir.path / "asked.json", asked)
        return run_dir
    before = _read(kept.read_text(encoding="utf-8"), dict[str, Any], str(kept))
    for name, value in asked.items():
        if before.get(name) != value:
            raise RunDirError(
                f"{out} is of another tuning: its {name} is {before.get(name)}, and {value} was "
                "asked for. Give another --out, or the command that it was begun with."
            )
    return RunDir(kept.parent.resolve())


def _read(text: str, kind: type[T], name: str) -> T:
    try:
        return msgspec.convert(json.loads(text), kind)
    except (ValueError, msgspec.ValidationError):
        raise RunDirError(f"{name} is damaged: remove it, and it is measured again.") from None
