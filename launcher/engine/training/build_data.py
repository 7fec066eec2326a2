"""Read the data that a recipe describes, and plan what is read of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import TensorDataset

from launcher.engine.backends.base import Backend
from launcher.engine.data.order import OrderRequest, order_of
from launcher.engine.data.randomness import seed_all
from launcher.engine.data.recipe_data import call_data, sample_count
from launcher.engine.data.sampler import EvaluationSchedule, Sampler
from launcher.engine.data.streams import Stream, StreamState
from launcher.engine.training.data_watch import BadSamples, DataWatch
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.planning.stages import Course
from launcher.printable import kind_of
from launcher.recipe.evaluation_sets import metric_name, split_of, title_of
from launcher.recipe.recipe import Data, Recipe


def build_data(recipe: Recipe, plan: Plan) -> Data:
    """Call the recipe's data function, with seeded generators, and return its data.

    Raises:
        RecipeError: The function did not return `launcher.Data`, its `collate` is no function, or
            the number of training samples is not the planned one.
    """
    seed_all(recipe.seed)
    data = call_data(recipe)
    num_samples = sample_count(data.train, "train", plan.train_samples)
    if plan.train_samples is not None and num_samples != plan.train_samples:
        raise RecipeError(
            f"The plan expects {plan.train_samples:,} training samples, but the data has "
            f"{num_samples:,}. Set train_samples={num_samples} in the recipe, or check what its "
            "data function reads."
        )
    return data


def make_sampler(
    data: Data, plan: Plan, backend: Backend, first_step: int, *, evaluates: bool
) -> Sampler:
    """Return the sampler of this rank.

    Raises:
        RecipeError: The data lacks what its order, its batch or its evaluation needs.
    """
    num_samples = sample_count(data.train, "train", plan.train_samples)
    check_tokens(data.train, plan.settings.get("tokens_per_sample"))
    return Sampler(
        plan=plan,
        rank=backend.data_rank,
        train_samples=num_samples,
        order=order_of(data.train, num_samples, order_request(plan, num_samples), data.lengths),
        evaluations=evaluation_schedules(data, plan) if evaluates else (),
        stream_step=first_step if isinstance(data.train, Stream) else None,
    )


def evaluation_schedules(data: Data, plan: Plan) -> tuple[EvaluationSchedule, ...]:
    """Return the evaluation sets of a recipe's data, in their order.

    Raises:
        RecipeError: A set has no length, cannot be indexed, or is empty.
    """
    return tuple(
        EvaluationSchedule(
            name=name,
            samples=sample_count(each.data, title_of(split_of(name))),
            every=each.every or plan.evaluate_every or "epoch",
        )
        for name, each in data.evaluation_sets().items()
    )


def order_request(plan: Plan, num_samples: int) -> OrderRequest:
    """Return what the order of the training samples depends on.

    Args:
        plan: The plan.
        num_samples: Number of positions in an epoch.
    """
    return OrderRequest(
        seed=plan.seed,
        shuffle=plan.settings.get("shuffle", "global"),
        window=plan.settings.get("shuffle_window", 1),
        batch_size=plan.batch_size,
        total_positions=Course(plan.stages, num_samples).position(plan.total_steps),
        is_timed=plan.settings.get("max_time") is not None,
    )


def check_tokens(dataset: Any, stated: int | None) -> None:
    """Refuse training samples without the number of tokens that the recipe states.

    The number is the attribute `tokens_per_sample` of the data set, or the second size of the first
    tensor of a TensorDataset.

    Args:
        dataset: The training set.
        stated: `Recipe.tokens_per_sample`; None checks nothing.

    Raises:
        RecipeError: The samples have no fixed number of tokens, or another one.
    """
    if stated is None:
        return
    found = getattr(dataset, "tokens_per_sample", None)
    if found is None and type(dataset) is TensorDataset and dataset.tensors[0].ndim > 1:
        found = dataset.tensors[0].shape[1]
    if not isinstance(found, int):
        raise RecipeError(
            f"tokens_per_sample={stated}: the training set, {kind_of(dataset)}, does not say that "
            "its samples have a fixed number of tokens. Give it an attribute tokens_per_sample, "
            "pack its documents with launcher.Packed, or state the batch by batch_size without "
            "tokens_per_sample."
        )
    if found != stated:
        raise RecipeError(
            f"The recipe has tokens_per_sample={stated}, and the training samples have {found} "
            f"tokens. Set tokens_per_sample={found}, or make the samples that long."
        )


def missed_evaluations(
    sampler: Sampler, recorded: Mapping[str, float] | None, first_step: int, last_step: int
) -> tuple[EvaluationSchedule, ...]:
    """Return the sets to evaluate before the first step of a resumed run."""
    if recorded is None or first_step == 0:
        return ()
    due = sampler.evaluations_after(first_step - 1)
    missed = tuple(each for each in due if metric_name(each.name, "loss") not in recorded)
    return due if missed and first_step >= last_step else missed


def make_watch(
    recipe: Recipe,
    sampler: Sampler,
    backend: Backend,
    is_stream: bool,
    stream_state: StreamState | None,
) -> DataWatch | None:
    """Return what observes a stream and bad samples; None if there is nothing to observe."""
    skips = recipe.bad_samples == "skip"
    if not (is_stream or skips):
        return None
    planned = sampler.samples_before(sampler.plan.total_steps)
    bad_samples = BadSamples(backend, recipe, planned) if skips else None
    return DataWatch(backend, is_stream=is_stream, state=stream_state, bad_samples=bad_samples)
