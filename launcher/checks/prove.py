"""The promise put to the test: one recipe under several worlds and strategies, compared.

Each configuration is a run of its own, started as any other. The first is what the rest is
compared with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.environment.machine import Machine
from launcher.errors import PlanError
from launcher.launch.launcher import import_for, launch
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.planning.planner import device_of
from launcher.planning.strategy import STRATEGIES, check_strategy
from launcher.recipe.overrides import Override, build
from launcher.recipe.recipe import Recipe, StrategyName
from launcher.recipe.resolve import Reference
from launcher.runs.failure_record import RunFailedError
from launcher.runs.job import Job, describe_run, plan_recipe
from launcher.runs.run_record import RunRecord, write_run
from launcher.runs.rundir import RunDir, create_run_dir

if TYPE_CHECKING:
    from launcher.engine.probes.inspection import Inspection
    from launcher.engine.probes.parity import ParityDifference

TOLERANCES = {"fp64": 1e-10, "fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
"""The relative difference that counts as rounding, by precision."""

_DEFAULT_STRATEGIES: tuple[StrategyName, ...] = ("ddp", "fsdp", "zero2")


@dataclass(frozen=True, kw_only=True)
class ParityRun:
    """One configuration of a proof."""

    strategy: str
    plan: Plan
    run_dir: RunDir


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """What came of one configuration."""

    trial: ParityRun
    exit_code: int
    """Of the run."""

    error: str = ""
    """The post-mortem of a run that failed."""

    difference: ParityDifference | None
    """From the first configuration; None for that itself, and for a run that failed."""

    @property
    def agrees(self) -> bool:
        """Whether the run took the same steps as the first."""
        return self.exit_code == 0 and (self.difference is None or self.difference.agrees)


def plan_trials(
    reference: Reference,
    overrides: Sequence[Override],
    machine: Machine,
    *,
    worlds: Sequence[int],
    strategies: Sequence[str] | None,
    folder: Path,
) -> list[ParityRun]:
    """Plan every strategy on every number of ranks, and make the folders.

    Strategies that are the same on one process come once there; one that needs several is left out.
    Without `strategies` they are a common few, as far as they go with the recipe's settings.

    Raises:
        PlanError: The recipe is another training on another number of ranks, or a configuration
            cannot run.
    """
    if strategies is None:
        strategies = _defaults(build(reference, overrides).recipe, machine, max(worlds))
    over_several_ranks = {name for name, kind in STRATEGIES.items() if kind.needs_several_ranks}
    plans: dict[tuple[str, int], tuple[Plan, RunRecord]] = {}
    for ranks in worlds:
        for strategy in strategies:
            if ranks == 1 and strategy in over_several_ranks:
                continue
            built, plan = plan_recipe(
                reference, _trial_overrides(overrides, strategy), machine, nproc_per_node=ranks
            )
            if built.recipe.batch_size_per_gpu is not None:
                raise PlanError(
                    f"batch_size_per_gpu={built.recipe.batch_size_per_gpu} lets the batch grow "
                    "with the ranks, so that each number of them is another training: there is "
                    f"nothing to prove. Give batch_size={plan.batch_size}."
                )
            plans[strategy, ranks] = plan, describe_run(reference, built, plan)
    if not plans:
        raise PlanError("strategy=fsdp needs 2 ranks or more: add them to --worlds.")
    trials = []
    for (strategy, ranks), (plan, description) in plans.items():
        run_dir = create_run_dir(folder / f"{strategy}-{ranks}", plan.recipe)
        write_run(run_dir, description)
        trials.append(ParityRun(strategy=strategy, plan=plan, run_dir=run_dir))
    return trials


def run_trials(
    reference: Reference,
    overrides: Sequence[Override],
    trials: Sequence[ParityRun],
    *,
    steps: int,
    tolerance: float | None,
    signals: SignalHandler,
) -> Iterator[ParityRow]:
    """Run the trials one after the other, and yield what came of each.

    Args:
        reference: The recipe.
        overrides: Those that the trials were planned with.
        trials: The first is what the others are compared with; the rest is not run if it fails.
        steps: Steps to take of those planned.
        tolerance: The relative difference that counts as rounding; None goes by the precision.
        signals: Handles signals for the runs.
    """
    import_for([trial.plan for trial in trials])
    wanted = None
    for trial in trials:
        try:
            launch(_job(reference, overrides, trial, steps), signals=signals)
        except RunFailedError as error:
            yield ParityRow(
                trial=trial, exit_code=error.exit_code, difference=None, error=str(error)
            )
            if wanted is None:
                return
            continue
        from launcher.engine.probes.parity import compare, read_trace

        found = read_trace(trial.run_dir)
        trial.run_dir.model.unlink()  # as large as the model, once for every trial
        if wanted is None:
            wanted = found
            yield ParityRow(trial=trial, exit_code=0, difference=None)
            continue
        allowed = TOLERANCES[trial.plan.precision] if tolerance is None else tolerance
        yield ParityRow(trial=trial, exit_code=0, difference=compare(wanted, found, allowed))


def inspect_trial(
    reference: Reference,
    overrides: Sequence[Override],
    trial: ParityRun,
    signals: SignalHandler,
) -> Inspection | None:
    """Try the recipe's data, model and loss out in a process of its own; None if that fails."""
    from launcher.engine.probes.inspection import read_inspection
    from launcher.engine.worker import agent_inspection

    alone = replace(trial.plan, nproc_per_node=1)
    job = replace(_job(reference, overrides, trial, 0), plan=alone)
    try:
        launch(job, agent_inspection, signals=signals)
    except RunFailedError:
        return None
    return read_inspection(trial.run_dir)


def _defaults(recipe: Recipe, machine: Machine, world_size: int) -> list[str]:
    """Return the strategies to compare where none were named: ddp alone, if none can run."""
    found: list[str] = []
    for name in _DEFAULT_STRATEGIES:
        try:
            check_strategy(
                replace(recipe, strategy=name), machine, device_of(recipe, machine), world_size
            )
        except PlanError:
            continue
        found.append(name)
    return found or ["ddp"]


def _trial_overrides(overrides: Sequence[Override], strategy: str) -> tuple[Override, ...]:
    """Return the overrides that a trial is both planned and run with."""
    settings = {"strategy": strategy, "record_samples": True, "trackers": ()}
    added = (Override(name=n, value=v, source="launcher prove") for n, v in settings.items())
    return (*overrides, *added)


def _job(reference: Reference, overrides: Sequence[Override], trial: ParityRun, steps: int) -> Job:
    return Job(
        recipe=reference.location,
        overrides=_trial_overrides(overrides, trial.strategy),
        plan=trial.plan,
        run_dir=trial.run_dir,
        launcher_pid=os.getpid(),
        last_step=min(steps, trial.plan.total_steps),
        saves=False,
        trial=False,  # what is wrong is for the comparison to show
        output_mode="quiet",
    )
