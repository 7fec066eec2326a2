"""A recipe with settings of its own, trained for a while to be measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.environment.machine import Machine
from launcher.launch.launcher import launch
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.recipe.overrides import BuiltRecipe, Override, build
from launcher.recipe.recipe import Recipe
from launcher.recipe.resolve import Reference
from launcher.runs.job import Job, describe_run, plan_recipe
from launcher.runs.run_record import RunRecord, write_run
from launcher.runs.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class Target:
    """A recipe with the user's overrides, on the ranks that it would be trained on."""

    reference: Reference
    overrides: tuple[Override, ...]
    machine: Machine
    nproc_per_node: int | None
    """Ranks; None is one per GPU, or a few on CPUs."""

    def having(self, source: str, **settings: Any) -> Target:
        """Return it with settings that are stronger than the user's."""
        own = (Override(name=name, value=value, source=source) for name, value in settings.items())
        return replace(self, overrides=(*self.overrides, *own))

    def given(self) -> Mapping[str, Any]:
        """Return what the overrides set, as plain values.

        Raises:
            OverrideError: One of them does not fit.
        """
        return build(self.reference, self.overrides).overrides

    def plan(self) -> tuple[Recipe, Plan]:
        """Return the recipe with all overrides, and its plan.

        Raises:
            PlanError: It cannot be trained like that.
        """
        built, plan = self._plan()
        return built.recipe, plan

    def probe(self) -> Probe:
        """Return it as a stretch of training.

        Raises:
            PlanError: It cannot be trained like that.
        """
        built, plan = self._plan()
        return Probe(
            reference=self.reference,
            overrides=self.overrides,
            recipe=built.recipe,
            plan=plan,
            description=describe_run(self.reference, built, plan),
        )

    def _plan(self) -> tuple[BuiltRecipe, Plan]:
        return plan_recipe(
            self.reference, self.overrides, self.machine, nproc_per_node=self.nproc_per_node
        )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A stretch of training, planned."""

    reference: Reference
    overrides: tuple[Override, ...]
    """The user's, and those that make it a probe."""

    recipe: Recipe
    """With all of them."""

    plan: Plan
    description: RunRecord
    """For run.yaml."""


def run_probe(
    probe: Probe,
    run_dir: RunDir,
    function: Callable[[Job], int],
    signals: SignalHandler,
    *,
    last_step: int | None = None,
    memory_bytes: int | None = None,
    seconds: float | None = None,
    quiet: bool = False,
) -> None:
    """Run `function` on the ranks of a probe.

    Args:
        probe: What to train.
        run_dir: Where to write.
        function: What each rank calls, of `launcher.engine.worker`.
        signals: What has been listening for signals.
        last_step: Steps to take; None takes all.
        memory_bytes: The most that each rank may use; None is all there is.
        seconds: For how long to measure, where that is not told by steps.
        quiet: Whether the ranks write to their logs alone.

    Raises:
        RunFailedError: A rank failed.
    """
    write_run(run_dir, replace(probe.description, probe=True))
    job = Job(
        recipe=probe.reference.location,
        overrides=probe.overrides,
        plan=probe.plan,
        run_dir=run_dir,
        launcher_pid=os.getpid(),
        last_step=last_step,
        memory_bytes=memory_bytes,
        seconds=seconds,
        saves=False,
        output_mode="quiet" if quiet else "progress",
    )
    launch(job, function, signals=signals)
