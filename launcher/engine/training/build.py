"""Build the data, the model and the optimizer that a recipe describes."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from launcher.engine.backends.base import Backend
from launcher.engine.backends.transfers import upload_scalar
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.open_files import open_files, opened_since
from launcher.engine.data.prefetching import micro_batches, raise_if_error
from launcher.engine.data.randomness import seed_all
from launcher.engine.data.reader import Reader
from launcher.engine.data.sampler import (
    Horizon,
    MicroBatchRequest,
    Sampler,
)
from launcher.engine.data.streams import StreamState
from launcher.engine.metrics.collected_metrics import CollectedMetrics
from launcher.engine.metrics.noise_meter import STRIDE, make_noise_meter
from launcher.engine.model.averages import Averages
from launcher.engine.model.batch_norm import BatchNorms, check_first_batch_norm_input
from launcher.engine.model.blocks import checkpoint_activations, compile_blocks, find_blocks
from launcher.engine.model.forward_writes import ForwardWrites
from launcher.engine.model.fp8 import compute_in_fp8
from launcher.engine.model.sync_batch_norm import synchronize
from launcher.engine.optimizers.joint import evaluates_others, optimizers_in
from launcher.engine.saving.final_weights import check_savable
from launcher.engine.state.compiled import is_compiled, limit_compile_workers
from launcher.engine.state.hyperparameters import left_out_text, make_optimizer
from launcher.engine.state.initial_values import InitialValues, value_checksum
from launcher.engine.state.parameter_kinds import check_parameters, keep_in_bfloat16
from launcher.engine.state.virtual_buffers import VirtualBuffers
from launcher.engine.training.build_data import (
    build_data,
    make_sampler,
    make_watch,
    missed_evaluations,
)
from launcher.engine.training.context import TrainContext
from launcher.engine.training.initial_model import build_initial_model
from launcher.engine.training.live_schedules import Plateau, with_live_schedules
from launcher.engine.training.objectives import TrainedObjective, prepare_objectives
from launcher.engine.training.train_metrics import with_train_metrics
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.planning.single_sample_batches import has_single_sample_batches
from launcher.recipe.keep_best import check_set_metric
from launcher.recipe.recipe import Recipe
from launcher.runs.heartbeat import PHASES
from launcher.runs.job import RecipeSource


def build_context(
    recipe: Recipe,
    plan: Plan,
    backend: Backend,
    *,
    first_step: int = 0,
    last_step: int,
    evaluates: bool = True,
    recorded: Mapping[str, float] | None = None,
    stream_state: StreamState | None = None,
    is_restored: bool = False,
    trial: bool = False,
    source: RecipeSource | None = None,
    noise_stride: int = STRIDE,
    report_phase: Callable[[int, str], None] = lambda *_: None,
    read: Callable[[Sampler], Iterator[MicroBatchRequest]] | None = None,
) -> TrainContext:
    """Build what the recipe describes, ready to train from `first_step` on (collective).

    Args:
        recipe: What to train.
        plan: The plan that was made for this recipe.
        backend: This rank among the others.
        first_step: Number of steps that were taken before.
        last_step: Number of steps that have been taken at the end.
        evaluates: Whether the evaluation data will be visited, if there is any.
        recorded: The metrics that the resumed run has recorded after `first_step` steps, by name.
            The sets that are due then and not among them are evaluated before the next step. None
            evaluates none of them, as in a new run.
        stream_state: Where the stream of training data stood at the checkpoint; None for data of
            another kind, and in a new run.
        is_restored: Whether a checkpoint will replace all parameters.
        trial: Whether the first micro-batches are those of `Sampler.trial`.
        source: What the recipe is built from; spawned DataLoader workers need it.
        noise_stride: If the recipe asks for the noise scale, one step in this many is measured.
        report_phase: Called with (steps taken, phase) whenever this rank enters a phase.
        read: Returns the requests to read in place of those of the steps, where none is taken.

    Raises:
        RecipeError: The recipe or its data is at fault.
    """
    files_before = open_files()
    data = backend.local_rank_zero_first("read the data", lambda: build_data(recipe, plan))
    report_phase(first_step, PHASES[0])
    sampler = make_sampler(data, plan, backend, first_step, evaluates=evaluates)
    is_stream = sampler.stream_step is not None
    recipe, plateaus = with_live_schedules(
        recipe, plan, sampler, has_evaluations=bool(data.evaluation_sets())
    )
    recipe = with_train_metrics(recipe)
    if evaluates and read is None:
        _check_followed_metrics(recipe, plateaus, [each.name for each in sampler.evaluations])
    missed = missed_evaluations(sampler, recorded, first_step, last_step)
    reader = Reader(recipe, data, source, backend.device if read is None else None)
    reader.held_files = opened_since(files_before)
    if stream_state is not None and is_stream and first_step < plan.total_steps:
        reader.restore_stream(stream_state)

    horizon = Horizon(plan.total_steps)

    def start_reading(sampler: Sampler) -> Iterator[MicroBatch]:
        if read is not None:
            return micro_batches(reader, read(sampler), plan)
        requests = sampler.requests(first_step, horizon) if first_step < last_step else iter(())
        if missed or first_step >= last_step:
            requests = itertools.chain(sampler.evaluation(missed or None), requests)
        if trial:
            requests = itertools.chain(sampler.trial(), requests)
        return micro_batches(reader, requests, plan)

    # The workers start here: they read while the model is built, and do not inherit it.
    batches = start_reading(sampler)
    first_batch = functools.partial(_read_first_batch, reader, sampler)
    model, optimizer, num_trained, objectives = build_model_and_optimizer(
        recipe, plan, backend, first_batch, is_restored=is_restored
    )
    report_phase(first_step, PHASES[0])
    if plan.virtual_ranks is not None:
        backend.virtual_buffers = VirtualBuffers(
            backend.unwrap(model), plan.distribution.of_rank(backend.data_rank), plan.virtual_ranks
        )
    batch_norms = BatchNorms(model, backend.virtual_buffers)
    if has_single_sample_batches(plan, sampler.train_samples, batch_norms.statistics):
        # Rare, and only known once the model is built: what was prefetched is read again.
        sampler = replace(sampler, statistics=batch_norms.statistics)
        batches = start_reading(sampler)
        if first_step < last_step and not recipe.compile:  # hooks do not run in compiled code
            check_input = functools.partial(
                check_first_batch_norm_input,
                plan=plan,
                num_train_samples=sampler.train_samples,
                norms=batch_norms,
                num_first_samples=len(next(sampler.requests(first_step)).indices),
            )
            recipe = check_input(recipe)
            objectives = tuple(
                replace(each, recipe=check_input(each.recipe)) for each in objectives
            )
    return TrainContext(
        recipe=recipe,
        plan=plan,
        backend=backend,
        model=model,
        optimizer=optimizer,
        num_trained=num_trained,
        sampler=sampler,
        reader=reader,
        micro_batches=batches,
        horizon=horizon,
        batch_norms=batch_norms,
        forward_writes=ForwardWrites(model, backend, recipe.rank_buffers),
        collected=CollectedMetrics(recipe if sampler.evaluations else None, backend),
        report_phase=report_phase,
        noise_meter=make_noise_meter(recipe, backend, model, noise_stride),
        averages=_make_averages(recipe, plan, backend, model, optimizer, batch_norms),
        plateaus=plateaus,
        missed_evaluations=missed,
        objectives=objectives,
        data_watch=make_watch(recipe, sampler, backend, is_stream, stream_state),
    )


def _check_followed_metrics(recipe: Recipe, plateaus: tuple[Plateau, ...], sets: list[str]) -> None:
    """Refuse a metric that the training follows and that no evaluation set has.

    Raises:
        RecipeError: It is one of keep_best, or of a schedule.
    """
    if recipe.keep_best is not None:
        check_set_metric(recipe.keep_best, sets, recipe.metrics)
    for plateau in plateaus:
        check_set_metric(str(plateau.goal), sets, recipe.metrics, where="plateau(metric)")


def _make_averages(
    recipe: Recipe,
    plan: Plan,
    backend: Backend,
    model: nn.Module,
    optimizer: Optimizer,
    batch_norms: BatchNorms,
) -> Averages | None:
    """Return the average of the weights that the recipe asks for, if any.

    Raises:
        RecipeError: The optimizer evaluates other weights than it trains itself.
    """
    if recipe.averaging is None:
        return None
    if evaluates_others(optimizer):
        names = " and ".join(type(each).__name__ for each in optimizers_in(optimizer))
        raise RecipeError(
            f"averaging={recipe.averaging}: the recipe's optimizer is {names}, which evaluates "
            "other weights than it trains itself. Remove averaging, or use another optimizer."
        )
    return Averages(recipe.averaging, plan, backend, model, batch_norms)


def build_model_and_optimizer(
    recipe: Recipe,
    plan: Plan,
    backend: Backend,
    first_batch: Callable[[], Any],
    *,
    is_restored: bool = False,
) -> tuple[nn.Module, Optimizer, int, tuple[TrainedObjective, ...]]:
    """Build the recipe's model and optimizer and place them on this rank (collective).

    Args:
        recipe: What to train.
        plan: The plan that was made for this recipe.
        backend: This rank among the others.
        first_batch: Reads a batch, the same on every rank, with which lazy layers are initialised.
        is_restored: Whether a checkpoint will replace all parameters.

    Returns:
        The module that `Backend.forward` takes, its optimizer, the number of trainable weights over
        all ranks, and the objectives, if the recipe has several.

    Raises:
        RecipeError: The recipe's model function did not return a module, returned different weights
            on some ranks, or returned a model that cannot do what the settings ask for.
    """
    model, initial = build_initial_model(
        recipe, plan, backend, first_batch, is_restored=is_restored
    )
    num_trained = sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    if not num_trained:
        raise RecipeError("The recipe's model has no parameter that requires a gradient.")
    check_savable(model)
    check_parameters(model, plan)
    if initial is None:
        _check_same_weights(checksum_of(model), backend)
    if plan.precision == "fp64":
        model = model.double()
    if recipe.param_dtype == "bf16":
        keep_in_bfloat16(model)
    if recipe.sync_batchnorm and backend.world_size > 1:
        model = synchronize(model)
    if recipe.fp8:
        compute_in_fp8(model)
    blocks = _set_up_blocks(recipe, plan, model)
    if is_compiled(model):  # also by the recipe itself
        limit_compile_workers(plan.threads_per_rank)

    prepared, optimizer, objectives = _place(recipe, plan, backend, model, blocks, initial)
    if initial is not None:
        checksums = sorted(initial.checksums.items())
        _check_same_weights(zlib.crc32(repr(checksums).encode()), backend)
    return prepared, optimizer, num_trained, objectives


def _place(
    recipe: Recipe,
    plan: Plan,
    backend: Backend,
    model: nn.Module,
    blocks: list[nn.Module],
    initial: InitialValues | None,
) -> tuple[nn.Module, Optimizer, tuple[TrainedObjective, ...]]:
    """Place a model on this rank, with its optimizer or those of its objectives (collective)."""
    if recipe.objectives:
        return prepare_objectives(recipe, plan, backend, model, blocks, initial)

    def make_seeded_optimizer(module: nn.Module) -> Optimizer:
        # The generators depend on whether the weights were drawn or read.
        seed_all(recipe.seed)
        optimizer = make_optimizer(recipe, module, plan.lr)
        if backend.rank == 0 and (text := left_out_text(optimizer, module)):
            print(f"launcher: {text}", flush=True)
        return optimizer

    return *backend.prepare(model, blocks, make_seeded_optimizer, initial), ()


def _set_up_blocks(recipe: Recipe, plan: Plan, model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model, which recompute their activations or are compiled if asked for.

    Raises:
        RecipeError: The recipe asks to recompute activations, and the model has no blocks, or
            compiled ones with BatchNorm.
    """
    blocks = find_blocks(model, recipe.blocks)
    if recipe.activation_checkpointing and not blocks:
        raise RecipeError(
            "activation_checkpointing=true recomputes the activations of the model's blocks, but "
            "the model has no blocks: no layers made of several modules that repeat in a "
            "ModuleList or Sequential. Name the class of the blocks with blocks=..., or remove "
            "activation_checkpointing."
        )
    if recipe.compile:
        compile_blocks(model, blocks, exact=plan.exact)
    if recipe.activation_checkpointing:  # outside of what is compiled, which takes no contexts
        checkpoint_activations(blocks)
    return blocks


def _read_first_batch(reader: Reader, sampler: Sampler) -> Any:
    """Read the first training samples of the trial in this process."""
    return raise_if_error(reader[replace(sampler.trial()[0], trial=False)]).batch


def checksum_of(model: nn.Module) -> int:
    """Return a checksum of the first values of every parameter."""
    checksum = 0
    for parameter in model.parameters():
        checksum = value_checksum(parameter, checksum)
    return checksum


def _check_same_weights(checksum: int, backend: Backend) -> None:
    """Refuse initial weights that differ between ranks (collective).

    The first weights of every parameter are compared: unseeded random weights differ everywhere.

    Args:
        checksum: The checksum of this rank's weights.
        backend: This rank among the others.

    Raises:
        RecipeError: The weights differ on some rank.
    """
    # Each is below 2**32, so the sum over a million ranks is exact in float64.
    total = backend.read(backend.sum(upload_scalar(checksum, backend.device)))
    if backend.any_rank(int(total) != checksum * backend.world_size):
        raise RecipeError(
            "The recipe's model function returned different initial weights on some ranks. They "
            "depend on something other than the global generators of torch, numpy and random, "
            "which launcher seeds: on a generator of the recipe's own, for example, or on the "
            "time. Seed that as well."
        )
