"""Short trainings at several learning rates, one after the other in the same ranks.

A search trains about ten times for a second or two. Starting ranks for each of these trainings
would take as long as the trainings, so that the ranks of a search take all of them. Each training
has a new backend, model and optimizer in the process group of the first.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import asdict, replace

from launcher.analysis.lr_curve import LossCurve
from launcher.analysis.lr_trials import (
    LRTrial,
    final_loss,
    next_lr,
    training_name,
)
from launcher.engine.backends import open_backend
from launcher.engine.data.device_data import is_indexed
from launcher.engine.probes.measuring import ProbeContext, StopAtDivergence
from launcher.engine.training.loop import train
from launcher.environment.world import find_world
from launcher.planning.planner import make_plan
from launcher.recipe.evaluation_sets import metric_name
from launcher.recipe.recipe import Data, Recipe
from launcher.runs.files import write_json

_MAX_KEPT_BYTES = 1 << 28
"""Data sets of tensors up to this size are kept from one training to the next."""


def run_lr_trainings(probe: ProbeContext) -> None:
    """Train at learning rates around the planned one, until the best lies between two worse ones.

    All ranks have the same losses, and therefore choose the same learning rates (collective). Rank
    0 writes the trials after each learning rate, and the curve of each training.
    """
    trials: list[LRTrial] = []
    kept: list[Data] = []
    while (lr := next_lr(trials, probe.recipe.lr)) is not None:
        curve = _train(probe, lr, kept)
        trials.append(LRTrial(lr=lr, loss=final_loss(curve, probe.plan.total_steps)))
        if probe.backend.rank == 0:
            write_json(probe.run_dir.trials, {"trials": [asdict(trial) for trial in trials]})


def _train(probe: ProbeContext, lr: float, kept: list[Data]) -> LossCurve:
    """Train at one learning rate, evaluate at the end, and return the losses (collective).

    Args:
        probe: The training at the first learning rate.
        lr: Peak learning rate.
        kept: The data of earlier trainings; may be empty.
    """
    recipe = replace(probe.recipe, lr=lr, data=_kept_data(probe.recipe, kept))
    plan = make_plan(
        recipe,
        probe.plan.machine,
        nproc_per_node=probe.plan.nproc_per_node,
        train_samples=probe.plan.train_samples,
    )
    world = replace(find_world(), store=None)  # the process group is there already
    own = replace(probe, recipe=recipe, plan=plan, backend=open_backend(recipe, plan, world))
    with own.collect_metrics() as collector:
        controller = StopAtDivergence(collector)
        context = own.build_train_context(evaluates=True)
        outcome = train(context, collector, controller)
    curve = controller.curve()
    if context.sampler.evaluations and outcome.step == plan.total_steps:
        name = metric_name(context.sampler.evaluations[0].name, "loss")
        held_out = outcome.evaluation.get(name, math.nan)
        is_finite = math.isfinite(held_out)
        curve = replace(curve, held_out=held_out) if is_finite else replace(curve, losses=())
    if own.backend.rank == 0:
        folder = probe.run_dir.path / training_name(lr)
        folder.mkdir(exist_ok=True)
        write_json(folder / probe.run_dir.curve.name, asdict(curve))
    del context, own
    gc.collect()  # a model and its optimizer refer to each other
    return curve


def _kept_data(recipe: Recipe, kept: list[Data]) -> Callable[[], Data]:
    """Return the data function of a recipe, which reads small data sets of tensors only once."""

    def data() -> Data:
        if kept:
            return kept[0]
        found = recipe.data()
        if isinstance(found, Data) and _num_bytes(found) <= _MAX_KEPT_BYTES:
            kept.append(found)
        return found

    return data


def _num_bytes(data: Data) -> float:
    """Return the bytes of data that consists of tensors alone; else infinity."""
    sets = [(data.train, data.collate)] + [
        (each.data, each.collate or data.collate) for each in data.evaluation_sets().values()
    ]
    if not all(is_indexed(dataset, collate) for dataset, collate in sets):
        return math.inf
    tensors = [tensor for dataset, _ in sets for tensor in dataset.tensors]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
