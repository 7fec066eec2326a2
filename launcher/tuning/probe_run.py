"""Probes: short runs of a recipe with settings of their own, which are trained to be measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.environment.machine import Machine
from launcher.launch.launcher import launch
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.recipe.overrides import BuiltRecipe, Override, build
from launcher.recipe.recipe import Recipe
from launcher.recipe.resolve import Reference
from launcher.runs.job import Job
from launcher.runs.plan_recipe import describe_run, plan_recipe
from launcher.runs.run_record import RunRecord, write_run
from launcher.runs.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class Target:
    """A recipe with overrides, and the ranks of this machine that would train it."""

    reference: Reference
    """Where the recipe is defined."""

    overrides: tuple[Override, ...]
    """Settings that differ from the recipe's; later ones take precedence."""

    machine: Machine
    """The machine to measure on."""

    nproc_per_node: int | None
    """Number of ranks; None is one per GPU, or a few on CPUs."""

    records: list[RunRecord] = field(default_factory=list, repr=False, compare=False)
    """The record of the first probe, which the targets that are derived from this one share."""

    def with_settings(self, source: str, **settings: Any) -> Target:
        """Return the target with further settings, which take precedence over the present ones.

        Args:
            source: The origin of the settings, which errors and plans mention.
            settings: Values by name.
        """
        overrides = (
            Override(name=name, value=value, source=source) for name, value in settings.items()
        )
        return replace(self, overrides=(*self.overrides, *overrides))

    def override_values(self) -> Mapping[str, Any]:
        """Return the values that the overrides set, by name, as plain values.

        Raises:
            OverrideError: An override does not fit the recipe.
        """
        return build(self.reference, self.overrides).overrides

    def plan(self) -> tuple[Recipe, Plan]:
        """Return the recipe with all overrides, and its plan.

        Raises:
            PlanError: The recipe cannot be trained with these settings on these ranks.
        """
        built, plan = self._plan()
        return built.recipe, plan

    def probe(self) -> Probe:
        """Return the target as a planned probe.

        Raises:
            PlanError: The recipe cannot be trained with these settings on these ranks.
        """
        built, plan = self._plan()
        return Probe(
            reference=self.reference,
            overrides=self.overrides,
            recipe=built.recipe,
            plan=plan,
            description=self._describe(built, plan),
        )

    def _describe(self, built: BuiltRecipe, plan: Plan) -> RunRecord:
        """Return the record of a probe; versions and code are those of the first one."""
        if not self.records:
            self.records.append(describe_run(self.reference, built, plan))
        return replace(self.records[0], overrides=dict(built.overrides), plan=plan.to_dict())

    def _plan(self) -> tuple[BuiltRecipe, Plan]:
        return plan_recipe(
            self.reference, self.overrides, self.machine, nproc_per_node=self.nproc_per_node
        )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A planned short run, whose weights are discarded after the measurement."""

    reference: Reference
    """Where the recipe is defined."""

    overrides: tuple[Override, ...]
    """The user's overrides, followed by those of the probe."""

    recipe: Recipe
    """The recipe with all overrides."""

    plan: Plan
    """The plan of that recipe."""

    description: RunRecord
    """The contents of run.yaml."""


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
    while_running: Callable[[], object] = lambda: None,
) -> None:
    """Call `function` on every rank of a probe and wait for the ranks to exit.

    Args:
        probe: The probe to run.
        run_dir: Folder that receives run.yaml and the measurement.
        function: What each rank calls, from `launcher.engine.worker`.
        signals: The signal handler of this process.
        last_step: Steps to train, or steps of warm-up for `agent_profile`; None trains all planned
            steps.
        memory_bytes: Memory limit of each rank; None leaves a margin free on a GPU and sets no
            limit on a CPU.
        seconds: Duration of a measurement that is limited by time rather than steps.
        quiet: Whether the ranks write only to their logs.
        while_running: Called many times a second while the ranks run.

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
    launch(job, function, signals=signals, while_running=while_running)
