"""What a recipe describes, built: its data, its model, its optimizer."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer

from launcher.engine.backends.base import Backend
from launcher.engine.data.open_files import open_files, opened_since
from launcher.engine.data.randomness import seed_all
from launcher.engine.data.reader import MicroBatch, Reader, micro_batches, sample_count
from launcher.engine.data.sampler import Sampler
from launcher.engine.metrics.noise_meter import STRIDE, make_noise_meter
from launcher.engine.model.batch_norm import BatchNorms, refuse_single_samples, synchronize
from launcher.engine.model.blocks import checkpoint_activations, compile_blocks, find_blocks
from launcher.engine.model.forward_writes import ForwardWrites
from launcher.engine.saving.final_weights import check_savable
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.engine.training.loop import TrainContext
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.planning.single_sample_batches import cuts_to_one
from launcher.recipe.recipe import Data, Recipe
from launcher.runs.job import RecipeSource

_SAMPLED_WEIGHTS = 1024


def build_context(
    recipe: Recipe,
    plan: Plan,
    backend: Backend,
    *,
    first_step: int = 0,
    last_step: int,
    evaluates: bool = True,
    trial: bool = False,
    source: RecipeSource | None = None,
    noise_stride: int = STRIDE,
    report_phase: Callable[[int, str], None] = lambda *_: None,
) -> TrainContext:
    """Build what the recipe describes, for the steps from `first_step` on (collective).

    Args:
        recipe: What to train.
        plan: How; its numbers are those of the recipe.
        backend: This rank among the others.
        first_step: Steps that were taken before.
        last_step: Steps to have been taken in the end.
        evaluates: Whether the evaluation data will be visited, where there is any.
        trial: Whether the first micro-batches are those of `Sampler.trial`.
        source: What the recipe is built from; spawned DataLoader workers need it.
        noise_stride: One step in so many is measured, if the recipe asks for the noise scale.
        report_phase: Is told how far this rank is.

    Raises:
        RecipeError: The recipe or its data is at fault.
    """
    before = open_files()
    data = backend.in_turn("read the data", lambda: build_data(recipe, plan))
    visited = data.evaluation if evaluates else None
    sampler = Sampler(
        plan=plan,
        rank=backend.rank,
        train_samples=sample_count(data.train, "train"),
        evaluation_samples=0 if visited is None else sample_count(visited, "evaluation"),
    )

    reader = Reader(recipe, data, source)
    reader.held_files = opened_since(before)

    def start_reading(sampler: Sampler) -> Iterator[MicroBatch]:
        requests = sampler.requests(first_step) if first_step < last_step else sampler.evaluation()
        if trial:
            requests = itertools.chain(sampler.trial(), requests)
        return micro_batches(reader, requests, plan)

    # The workers start here: they read while the model is built, and do not inherit it.
    batches = start_reading(sampler)
    model, optimizer, num_trained = build_model_and_optimizer(recipe, plan, backend)
    norms = BatchNorms(model)
    if cuts_to_one(plan, sampler.train_samples, norms.statistics):
        # Rare, and known only now. What has been read ahead is read once more.
        sampler = replace(sampler, statistics=norms.statistics)
        batches = start_reading(sampler)
        if first_step < last_step and not recipe.compile:  # no hook is seen in compiled code
            taken = len(next(sampler.requests(first_step)).indices)
            recipe = refuse_single_samples(recipe, plan, sampler.train_samples, norms, taken)
    return TrainContext(
        recipe=recipe,
        plan=plan,
        backend=backend,
        model=model,
        optimizer=optimizer,
        num_trained=num_trained,
        sampler=sampler,
        reader=reader,
        batches=batches,
        norms=norms,
        writes=ForwardWrites(model, backend, recipe.rank_buffers),
        report_phase=report_phase,
        noise=make_noise_meter(recipe, backend, model, noise_stride),
    )


def build_data(recipe: Recipe, plan: Plan) -> Data:
    """Return the recipe's data.

    Raises:
        RecipeError: It is none, or not as long as planned.
    """
    seed_all(recipe.seed)
    data = recipe.data()
    if not isinstance(data, Data):
        raise RecipeError(
            f"The recipe's data function returned {type(data).__name__}; expected "
            "launcher.Data(train=..., evaluation=...)."
        )
    found = sample_count(data.train, "train")
    if plan.train_samples is not None and found != plan.train_samples:
        raise RecipeError(
            f"The plan counts on {plan.train_samples:,} training samples, and the data has "
            f"{found:,}. Set train_samples={found} in the recipe, or look at what its data "
            "function reads."
        )
    return data


def build_model_and_optimizer(
    recipe: Recipe, plan: Plan, backend: Backend
) -> tuple[nn.Module, Optimizer, int]:
    """Return the recipe's model, ready to be called on this rank, and its optimizer (collective).

    And how many weights are trained, over all ranks.

    Raises:
        RecipeError: It is no model, or another one on some ranks, or cannot do what is asked.
    """
    model = backend.in_turn("built the model", lambda: _build_model(recipe))
    backend.wait_for_all("built the model")
    num_trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    if not num_trained:
        raise RecipeError("The recipe's model has no parameter that requires a gradient.")
    check_savable(model)
    _check_same_weights(model, backend)
    if plan.precision == "fp64":
        model = model.double()
    if recipe.sync_batchnorm and backend.world_size > 1:
        model = synchronize(model)
    blocks = find_blocks(model, recipe.blocks)
    if recipe.activation_checkpointing:
        if not blocks:
            raise RecipeError(
                "activation_checkpointing=true computes the activations inside blocks again, and "
                "the model has no blocks: no layers that repeat in a ModuleList or Sequential and "
                "are made of several. Name their class with blocks=..., or leave it out."
            )
        checkpoint_activations(blocks)
    if recipe.compile:
        compile_blocks(model, blocks)
    prepared = backend.prepare(model, blocks, lambda own: make_optimizer(recipe, own, plan.lr))
    return *prepared, num_trained


def _build_model(recipe: Recipe) -> nn.Module:
    seed_all(recipe.seed)  # the same initial weights on every rank
    model = recipe.model()
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"The recipe's model function returned {type(model).__name__}; expected a "
            "torch.nn.Module."
        )
    return model


def _check_same_weights(model: nn.Module, backend: Backend) -> None:
    """Refuse to start from weights that differ between ranks (collective).

    A sample of every parameter stands for it: what is drawn without a seed differs everywhere.
    """
    own = 0
    for parameter in model.parameters():
        sample = parameter.detach().flatten()[:_SAMPLED_WEIGHTS].double().contiguous()
        own = zlib.crc32(sample.numpy().tobytes(), own)
    # Below 2**32 each, so that the sum over a million ranks is exact in float64.
    total = backend.sum(torch.tensor(float(own), dtype=torch.float64, device=backend.device))
    if backend.any_rank(int(total.item()) != own * backend.world_size):
        raise RecipeError(
            "The recipe's model function returned other initial weights on some ranks: they come "
            "from something else than the global generators of torch, numpy and random, which are "
            "seeded, such as a generator of its own, or the time. Seed that as well."
        )
