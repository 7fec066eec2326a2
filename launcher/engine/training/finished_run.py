"""Evaluate the weights of a run, without training: what `launcher evaluate` does on each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from launcher.engine.backends.base import Backend
from launcher.engine.data.sampler import MicroBatchRequest, Sampler
from launcher.engine.optimizers.joint import evaluates_others
from launcher.engine.saving.checkpoint_tensors import StoredState, load_newest
from launcher.engine.saving.weight_sources import CheckpointWeights, FinalWeights
from launcher.engine.state.module_state import missing_extra_state
from launcher.engine.state.training_state import StateSource, parameters, write_groups
from launcher.engine.training.build import build_context
from launcher.engine.training.context import TrainContext
from launcher.engine.training.evaluation import evaluate
from launcher.errors import CheckpointError, RecipeError
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe
from launcher.runs.job import RecipeSource
from launcher.runs.weight_choice import WeightChoice


def evaluate_weights(
    recipe: Recipe,
    plan: Plan,
    backend: Backend,
    weights: WeightChoice,
    *,
    source: RecipeSource,
    report_phase: Callable[[int, str], None],
) -> dict[str, float]:
    """Return loss and metrics of the weights over the evaluation data (collective).

    On the number of ranks on which the run was trained, the values are those of the run to the bit.

    Args:
        recipe: The recipe of the run.
        plan: The plan of the evaluation.
        backend: This rank among the others.
        weights: What is evaluated.
        source: What the recipe is built from; spawned DataLoader workers need it.
        report_phase: Called with (steps taken, phase) whenever this rank enters a phase.

    Raises:
        RecipeError: The recipe has no evaluation data.
        CheckpointError: The weights are damaged, or belong to another model.
    """
    context = build_with_weights(
        recipe, plan, backend, weights, source=source, report_phase=report_phase
    )
    if not context.sampler.evaluations:
        raise RecipeError(
            f"The data of {recipe.name} has no evaluation set, so there is nothing to evaluate. "
            "Return Data(train=..., evaluation=...) from its data function."
        )
    return evaluate(context, weights.step, context.sampler.evaluations)


def build_with_weights(
    recipe: Recipe,
    plan: Plan,
    backend: Backend,
    weights: WeightChoice,
    *,
    source: RecipeSource,
    report_phase: Callable[[int, str], None],
    read: Callable[[Sampler], Iterator[MicroBatchRequest]] = Sampler.evaluation,
) -> TrainContext:
    """Build data and model with the weights of a run, ready for an evaluation (collective).

    Args:
        recipe: The recipe of the run.
        plan: The plan of the evaluation. The training set may have another size than it says.
        backend: This rank among the others.
        weights: The weights.
        source: What the recipe is built from.
        report_phase: Called with (steps taken, phase) whenever this rank enters a phase.
        read: Returns the requests that are read.

    Raises:
        CheckpointError: The weights are damaged, or belong to another model.
    """
    context = build_context(
        recipe,
        replace(plan, train_samples=None),
        backend,
        last_step=0,
        is_restored=True,
        source=source,
        report_phase=report_phase,
        read=read,
    )
    _restore(context, weights)
    return context


def _restore(context: TrainContext, choice: WeightChoice) -> None:
    """Fill model, buffers and extra state with the chosen weights (collective).

    The optimizer's state is restored only where the evaluated weights follow from it.
    """
    backend, optimizer = context.backend, context.optimizer
    module = backend.unwrap(context.model)
    source: StateSource
    keeps_optimizer = evaluates_others(optimizer)
    if choice.is_final:
        source = FinalWeights(choice, parameters(module).keys())
    else:
        checkpoint, manifest = load_newest(
            [choice.checkpoint], backend, fall_back=False, tell=lambda _: None
        )
        state = StoredState(checkpoint, manifest)
        source = CheckpointWeights(state, keeps_optimizer=keeps_optimizer)
    if missing := missing_extra_state(module, source):
        remedy = "Take the weights of a checkpoint, as with --checkpoint last." * choice.is_final
        raise CheckpointError(
            f"{source.name} lacks the extra state (get_extra_state) of {missing[0]}. {remedy}"
        )
    backend.restore(context.model, optimizer, source)
    if keeps_optimizer and not choice.is_final:
        write_groups(optimizer, source.values["groups"])
