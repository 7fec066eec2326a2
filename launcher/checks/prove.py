"""`launcher prove`: run a recipe on several numbers of ranks and strategies, compare the steps.

Each configuration is a run of its own, started like any other. The first one is the reference that
the others are compared with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.checks.trial_launches import launch_trials
from launcher.environment.machine import Machine
from launcher.errors import PlanError
from launcher.launch.launcher import launch
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.fsdp_settings import FSDP_DEFAULTS
from launcher.planning.plan import Plan
from launcher.planning.planner import device_of
from launcher.planning.strategy import STRATEGIES, check_strategy
from launcher.recipe.overrides import Override, build
from launcher.recipe.recipe import Recipe, StrategyName
from launcher.recipe.resolve import Reference
from launcher.runs.job import Job
from launcher.runs.plan_recipe import describe_run, plan_recipe
from launcher.runs.run_record import RunRecord, write_run
from launcher.runs.rundir import RunDir, create_run_dir

if TYPE_CHECKING:
    from launcher.engine.probes.inspection import Inspection
    from launcher.engine.probes.parity import ParityDifference

TOLERANCES = {"fp64": 1e-10, "fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
"""Largest relative difference that counts as rounding, by precision."""

_DEFAULT_STRATEGIES: tuple[StrategyName, ...] = ("ddp", "fsdp", "zero2")


@dataclass(frozen=True, kw_only=True)
class ParityRun:
    """One configuration to compare: a strategy on a number of ranks, with its run folder."""

    strategy: str
    plan: Plan
    run_dir: RunDir


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """The result of one configuration."""

    trial: ParityRun
    exit_code: int
    """Exit code of the run."""

    error: str = ""
    """The post-mortem of a run that failed."""

    difference: ParityDifference | None
    """Difference from the reference; None for the reference itself and for a run that failed."""

    evaluation: tuple[float, float] | None = None
    """Largest relative difference of an evaluated loss, and of any metric; None if there was no
    evaluation within the steps."""

    weights_digest: str = ""
    """SHA-256 of the final weights, in hexadecimal; empty for a run that failed."""

    @property
    def agrees(self) -> bool:
        """Whether the run succeeded, took the steps of the reference and evaluated alike."""
        if self.exit_code or self.difference is None:
            return not self.exit_code
        return self.difference.agrees and self.evaluates_alike

    @property
    def evaluates_alike(self) -> bool:
        """Whether evaluations differ by no more than rounding; in exact runs, not at all.

        A metric that counts answers jumps where rounding changes one, so that of inexact runs the
        losses are judged.
        """
        if self.evaluation is None or self.difference is None:
            return True
        loss, largest = self.evaluation
        tolerance = self.difference.tolerance
        return (largest if tolerance == 0 else loss) <= tolerance


def plan_trials(
    reference: Reference,
    overrides: Sequence[Override],
    machine: Machine,
    *,
    worlds: Sequence[int],
    strategies: Sequence[str] | None,
    folder: Path,
) -> list[ParityRun]:
    """Plan every strategy on every number of ranks and create the run folders.

    FSDP is skipped on one rank. With tensor_parallel, it is skipped on numbers of ranks that are
    no multiple of it, and the other strategies run without it.

    Args:
        reference: The recipe.
        overrides: Settings to apply to it.
        machine: The machine to plan for.
        worlds: Numbers of ranks.
        strategies: Strategies to compare; None chooses those of ddp, fsdp and zero2 that are
            compatible with the recipe's settings.
        folder: Folder in which the run folders are created.

    Raises:
        PlanError: The recipe sets batch_size_per_gpu, so its global batch depends on the number of
            ranks; or a configuration cannot run; or none is left.
    """
    recipe = build(reference, overrides).recipe
    if strategies is None:
        strategies = _compatible_strategies(recipe, machine, max(worlds))
    over_several_ranks = {name for name, kind in STRATEGIES.items() if kind.needs_several_ranks}
    plans: dict[tuple[str, int], tuple[Plan, RunRecord]] = {}
    description: RunRecord | None = None  # of the first; versions and code are those of all
    for ranks in worlds:
        for strategy in strategies:
            size = _tensor_parallel(recipe, strategy)
            if (ranks == 1 and strategy in over_several_ranks) or ranks % size:
                continue
            built, plan = plan_recipe(
                reference, _trial_overrides(overrides, strategy), machine, nproc_per_node=ranks
            )
            if built.recipe.batch_size_per_gpu is not None:
                raise PlanError(
                    f"batch_size_per_gpu={built.recipe.batch_size_per_gpu} makes the global batch "
                    "grow with the number of ranks, so the steps differ by design and there is "
                    f"nothing to compare. Set batch_size={plan.batch_size} instead."
                )
            if description is None:
                description = describe_run(reference, built, plan)
            record = replace(description, overrides=dict(built.overrides), plan=plan.to_dict())
            plans[strategy, ranks] = plan, record
    if not plans:
        needed = max(_tensor_parallel(recipe, "fsdp"), 2)
        raise PlanError(
            f"strategy=fsdp needs {needed} ranks or more: add such a number to --worlds."
        )
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
    """Run the trials and yield the result of each, in their order.

    The saved weights of a trial are deleted once they have been read.

    Args:
        reference: The recipe.
        overrides: The settings that the trials were planned with.
        trials: The trials. The first is the reference; if it fails, the others do not run.
        steps: Number of optimizer steps to take, at most those planned.
        tolerance: Largest relative difference that counts as rounding; None takes that of
            `TOLERANCES` for the precision of the trial, or 0 with exact=true.
        signals: Handles signals for the runs.
    """
    jobs = [_job(reference, overrides, trial, steps) for trial in trials]
    reference_trace = None
    for trial, outcome in zip(trials, launch_trials(jobs, signals), strict=True):
        if outcome.exit_code:
            yield ParityRow(
                trial=trial, exit_code=outcome.exit_code, difference=None, error=outcome.error
            )
            if reference_trace is None:
                return
            continue
        from launcher.engine.probes.parity import (
            compare,
            compare_evaluations,
            read_trace,
            tensors_digest,
        )

        trace = read_trace(trial.run_dir)
        digest = tensors_digest(trace.weights)
        trial.run_dir.model.unlink()  # else the disk holds the weights once for every trial
        if reference_trace is None:
            reference_trace = trace
            yield ParityRow(trial=trial, exit_code=0, difference=None, weights_digest=digest)
            continue
        default = 0.0 if trial.plan.exact else TOLERANCES[trial.plan.precision]
        difference = compare(reference_trace, trace, default if tolerance is None else tolerance)
        yield ParityRow(
            trial=trial,
            exit_code=0,
            difference=difference,
            evaluation=compare_evaluations(reference_trace, trace),
            weights_digest=digest,
        )


def inspect_trial(
    reference: Reference,
    overrides: Sequence[Override],
    trial: ParityRun,
    signals: SignalHandler,
) -> Inspection:
    """Inspect the data, model and loss of a recipe in a process of its own.

    Args:
        reference: The recipe.
        overrides: The settings that the trial was planned with.
        trial: The trial whose settings and run folder to use.
        signals: Handles signals for the inspection.

    Raises:
        RunFailedError: The inspection failed.
    """
    from launcher.engine.probes.inspection import read_inspection
    from launcher.engine.worker import agent_inspection

    alone = replace(trial.plan, nproc_per_node=1)
    job = replace(_job(reference, overrides, trial, 0), plan=alone)
    launch(job, agent_inspection, signals=signals)
    return read_inspection(trial.run_dir)


def _compatible_strategies(recipe: Recipe, machine: Machine, world_size: int) -> list[str]:
    """Return the default strategies that the recipe's settings allow, or ddp if none is allowed."""
    compatible: list[str] = []
    for name in _DEFAULT_STRATEGIES:
        try:
            check_strategy(
                _with_strategy(recipe, name), machine, device_of(recipe, machine), world_size
            )
        except PlanError:
            continue
        compatible.append(name)
    return compatible or ["ddp"]


def _tensor_parallel(recipe: Recipe, strategy: str) -> int:
    """Return the `tensor_parallel` of a recipe under a strategy; only FSDP takes it."""
    return recipe.tensor_parallel if _uses_fsdp(strategy) else 1


def _with_strategy(recipe: Recipe, strategy: StrategyName) -> Recipe:
    """Return the recipe with another strategy, without the settings of FSDP if it is another."""
    changes: dict[str, Any] = {}
    if not STRATEGIES[strategy].uses_fsdp:
        changes = {**FSDP_DEFAULTS, "tensor_parallel": 1}
    return replace(recipe, strategy=strategy, **changes)


def _uses_fsdp(strategy: str) -> bool:
    """Return whether FSDP implements a strategy; false for a name that the recipe will refuse."""
    return strategy in STRATEGIES and STRATEGIES[strategy].uses_fsdp


def _trial_overrides(overrides: Sequence[Override], strategy: str) -> tuple[Override, ...]:
    """Return the overrides that a trial is both planned and run with."""
    settings: dict[str, Any] = {"strategy": strategy, "record_samples": True, "trackers": ()}
    if not _uses_fsdp(strategy):  # the other strategies refuse its settings
        settings |= {**FSDP_DEFAULTS, "tensor_parallel": 1}
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
        trial=False,  # the comparison shows what the pre-run inspection would refuse
        output_mode="quiet",
    )
