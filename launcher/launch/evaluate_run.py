"""Start the ranks that evaluate the weights of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.console.failure import failure_with_log
from launcher.environment.machine import Machine, read_machine
from launcher.launch.launcher import launch
from launcher.launch.only_launcher import check_only_launcher
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.recipe.overrides import BuiltRecipe, Override
from launcher.recipe.resolve import Reference
from launcher.runs.evaluation_result import EvaluationResult, read_measured
from launcher.runs.failure_record import RunFailedError
from launcher.runs.job import Job
from launcher.runs.plan_recipe import describe_run, plan_recipe
from launcher.runs.private_folder import private_folder
from launcher.runs.rebuilding import folder_of, overrides_of, resolve_recorded, working_folder
from launcher.runs.run_record import RunRecord, read_run, write_run
from launcher.runs.rundir import RunDir, create_run_dir, open_run_dir
from launcher.runs.weight_choice import WeightChoice, choose_weights

_WITHOUT_TRAINING = {
    "averaging": None,
    "noise_scale": False,
    "record_samples": False,
    "trackers": (),
}
"""Settings that only a training needs. Averages in a checkpoint are the weights that are taken."""


@dataclass(frozen=True, kw_only=True)
class WeightsRequest:
    """A request to compute with the weights of a run."""

    run_dir: Path
    """The run folder."""

    checkpoint: str | None = None
    """`last`, `best`, or the checkpoint's step; None takes the final weights if there are any."""

    overrides: tuple[Override, ...] = ()
    """Values for the recipe that replace those of the run."""

    nproc_per_node: int | None = None
    """Ranks; None is as many as the run had, if this machine has as many GPUs."""


@dataclass(frozen=True, kw_only=True)
class PreparedWeights:
    """The weights of a run, and the plan of the ranks that compute with them."""

    weights: WeightChoice
    reference: Reference
    built: BuiltRecipe
    plan: Plan
    overrides: tuple[Override, ...]
    """All that the recipe was built with."""

    folder: Path
    """The folder in which the run was started, where the ranks work."""


def evaluate_run(request: WeightsRequest, signals: SignalHandler) -> EvaluationResult:
    """Evaluate the weights of a run over each evaluation set once.

    Raises:
        RunFailedError: A rank failed.
        UsageError: The run has no such weights, or its recipe cannot be built or planned.
    """
    from launcher.engine.worker import agent_evaluation

    prepared = prepare_weights(request)
    with computed(prepared, agent_evaluation, signals) as run_dir:
        metrics = read_measured(run_dir)
    return EvaluationResult(
        run_dir=prepared.weights.run_dir,
        weights=prepared.weights.name,
        step=prepared.weights.step,
        ranks=prepared.plan.world_size,
        metrics=metrics,
    )


def prepare_weights(request: WeightsRequest) -> PreparedWeights:
    """Choose the weights of a run, and plan the ranks that compute with them.

    Raises:
        UsageError: The run has no such weights, or its recipe cannot be built or planned.
    """
    check_only_launcher()
    run_dir = open_run_dir(request.run_dir)
    record = read_run(run_dir)
    weights = choose_weights(run_dir, request.checkpoint)
    machine, folder = read_machine(), folder_of(record)
    overrides = (*overrides_of(record), *request.overrides, *_settings(record, request))
    samples = record.plan.get("train_samples")
    with working_folder(folder):  # the recipe may read files by paths relative to it
        reference = resolve_recorded(record)
        built, plan = plan_recipe(
            reference,
            overrides,
            machine,
            nproc_per_node=request.nproc_per_node or _ranks_of(record, machine),
            count=lambda counting: samples if isinstance(samples, int) else counting(),
        )
    return PreparedWeights(
        weights=weights,
        reference=reference,
        built=built,
        plan=plan,
        overrides=overrides,
        folder=folder,
    )


def _settings(record: RunRecord, request: WeightsRequest) -> Iterator[Override]:
    """Yield the settings of ranks that do not train.

    The micro-batches are as large as those of the run, on any number of ranks.
    """
    settings: dict[str, Any] = dict(_WITHOUT_TRAINING)
    size = record.plan.get("micro_batch_size")
    if isinstance(size, int) and all(each.name != "micro_batch_size" for each in request.overrides):
        settings["micro_batch_size"] = size
    for name, value in settings.items():
        yield Override(name=name, value=value, source="the run")


def _ranks_of(record: RunRecord, machine: Machine) -> int | None:
    """Return the number of ranks of the run, or None if this machine has fewer GPUs."""
    ranks, on_gpus = record.nproc_per_node, record.plan.get("device") == "cuda"
    return None if on_gpus and machine.num_gpus < ranks else ranks


@contextlib.contextmanager
def computed(
    prepared: PreparedWeights,
    function: Callable[[Job], int],
    signals: SignalHandler,
    **details: object,
) -> Iterator[RunDir]:
    """Call `function` on every rank, and yield the folder of what they wrote in this context.

    Args:
        prepared: The weights and the plan.
        function: What each rank calls, from `launcher.engine.worker`.
        signals: Handler of the signals that end the ranks.
        details: Further fields of the job.

    Raises:
        RunFailedError: A rank failed.
    """
    with private_folder() as folder:
        run_dir = create_run_dir(folder / "ranks", prepared.plan.recipe)
        write_run(run_dir, describe_run(prepared.reference, prepared.built, prepared.plan))
        job = Job(
            recipe=prepared.reference.location,
            overrides=prepared.overrides,
            plan=prepared.plan,
            run_dir=run_dir,
            launcher_pid=os.getpid(),
            saves=False,
            output_mode="quiet",
            folder=prepared.folder,
            weights=prepared.weights,
            **details,  # type: ignore[arg-type]
        )
        try:
            launch(job, function, signals=signals)
        except RunFailedError as error:
            text = failure_with_log(error.failure, run_dir).removeprefix("launcher: ")
            raise RunFailedError(text, error.failure) from None
        yield run_dir
