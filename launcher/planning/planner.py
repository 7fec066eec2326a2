"""`make_plan`: from a recipe, a machine and a number of ranks to every number of a run.

Planning uses no GPU and reads no data. Numbers that contradict each other are refused here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from launcher.environment.machine import Machine
from launcher.errors import PlanError
from launcher.planning.derivations import (
    batch_arithmetic,
    counted,
    notes_for,
    order_text,
    quick_checkpoints_text,
    stages_text,
    steps_arithmetic,
    tokens_text,
    virtual_arithmetic,
)
from launcher.planning.fsdp_messages import sharding_texts
from launcher.planning.global_batch import ceil_div, num_micro_steps, shares
from launcher.planning.loading import loader_policy
from launcher.planning.lr_path import LRPath, lr_path
from launcher.planning.plan import Plan, PlannedObjective
from launcher.planning.sharding import sharding_for
from launcher.planning.single_sample_batches import single_sample_notes
from launcher.planning.stages import Stage, lr_factor, make_stages
from launcher.planning.strategy import (
    STRATEGIES,
    backend_for,
    check_strategy,
    check_tensor_parallel,
    check_virtual_ranks,
    distribute,
    performance_flags,
)
from launcher.planning.virtual_ranks import VirtualRanks
from launcher.recipe.optimizer import OptimizerSpec
from launcher.recipe.recipe import Recipe
from launcher.recipe.typed_values import INTEGER_LIMIT

MAX_RANKS = 1_000_000
"""Ranks that a plan may have; it lists the samples of each."""

CPU_RANKS = 2
"""Ranks per node on machines without a GPU, unless a number is asked for."""


def make_plan(
    recipe: Recipe,
    machine: Machine,
    *,
    nodes: int = 1,
    nproc_per_node: int | None = None,
    train_samples: int | None = None,
    sources: Mapping[str, str] | None = None,
) -> Plan:
    """Return the plan of a run of `recipe` on `nodes` machines like `machine`.

    Args:
        recipe: The recipe to plan.
        machine: The machine that each node is taken to be.
        nodes: Number of nodes.
        nproc_per_node: Ranks on each node; None is one per GPU, or `CPU_RANKS` without GPUs.
        train_samples: Size of the training set if the recipe does not state it. A recipe that
            states epochs needs it.
        sources: Where each setting came from, for the reader of the plan.

    Raises:
        PlanError: The numbers contradict each other, or ask for more than the machine has.
    """
    device, nproc = _ranks_per_node(recipe, machine, nproc_per_node)
    world_size = nodes * nproc
    if world_size > MAX_RANKS:
        raise PlanError(
            f"{nodes:,} nodes x {nproc:,} ranks were asked for; a plan has at most {MAX_RANKS:,} "
            "ranks."
        )
    check_strategy(recipe, machine, device, world_size)
    check_tensor_parallel(recipe, nproc)
    data_ranks = world_size // recipe.tensor_parallel
    sharding = sharding_for(recipe, nodes, nproc)
    batch_sizes = _batch_sizes(recipe, world_size)
    batch_size = batch_sizes[0]
    samples = recipe.train_samples or train_samples
    stages, total_steps = _stages(recipe, batch_sizes, samples)
    _check_max_time(recipe)
    _check_data_on_device(recipe)
    steps_per_epoch = ceil_div(samples, batch_size) if samples is not None else None
    parts = recipe.virtual_ranks or data_ranks
    distribution = distribute(
        recipe.virtual_ranks,
        data_ranks,
        recipe.strategy,
        exact=recipe.exact,
        shard_size=None if sharding is None else sharding.size,
    )
    micro_limit = recipe.micro_batch_size or ceil_div(max(batch_sizes), parts)
    micro_batches = num_micro_steps(batch_size, parts, micro_limit)
    accumulation = micro_batches * distribution.rounds
    micro = max(_micro_batch(size, parts, micro_limit) for size in batch_sizes)
    if recipe.noise_scale:
        _check_parts(recipe, data_ranks, accumulation)
    lr, lr_reason, path = _lr_of(recipe, batch_size, total_steps, stages)
    policy = loader_policy(
        usable_cores=machine.usable_cores,
        cores_limited_by=machine.cores_limited_by,
        nproc_per_node=nproc,
        device=device,
        in_memory=recipe.in_memory,
        data_on_device=recipe.data_on_device,
        num_workers=recipe.num_workers,
        prefetch_factor=recipe.prefetch_factor,
        pin_memory=recipe.pin_memory,
    )
    unit = "GPU" if device == "cuda" else "CPU rank"
    if recipe.virtual_ranks is None:
        arithmetic = batch_arithmetic(
            batch_size,
            nodes,
            nproc,
            unit,
            _micro_batch(batch_size, data_ranks, micro_limit),
            accumulation,
            tensor_parallel=recipe.tensor_parallel,
        )
    else:
        arithmetic = virtual_arithmetic(batch_size, distribution, micro_batches, unit)
    derivations = {
        "batch_size": arithmetic + tokens_text(recipe, batch_size),
        "stages": stages_text(stages, lr, recipe.lr_rule),
        "lr": lr_reason,
        "total_steps": steps_arithmetic(recipe, batch_size, samples, steps_per_epoch, total_steps),
        "workers_per_rank": policy.workers_reason,
        "pin_memory": policy.pin_reason,
        "order": order_text(recipe),
        "quick_checkpoints": quick_checkpoints_text(recipe, nodes),
        **sharding_texts(recipe, sharding, accumulation, distribution.rounds),
    }
    plan = Plan(
        recipe=recipe.name,
        nodes=nodes,
        nproc_per_node=nproc,
        world_size=world_size,
        tensor_parallel=recipe.tensor_parallel,
        device=device,
        strategy=recipe.strategy,
        backend=backend_for(recipe, world_size),
        batch_size=batch_size,
        stages=stages,
        samples_per_rank=_samples_per_rank(batch_size, distribution, recipe.tensor_parallel),
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        virtual_ranks=recipe.virtual_ranks,
        shard_size=None if sharding is None else sharding.size,
        exact=recipe.exact,
        lr=lr,
        lr_start=None if path is None else lr * path.start,
        lr_end=None if path is None else lr * path.end,
        lr_peak_step=None if path is None else path.peak_step,
        objectives=_objectives(recipe, batch_size, total_steps, stages),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        train_samples=samples,
        evaluate_every=recipe.evaluate_every,
        seed=recipe.seed,
        precision=recipe.precision,
        performance_flags=performance_flags(recipe, device),
        workers_per_rank=policy.workers_per_rank,
        prefetch_factor=policy.prefetch_factor,
        pin_memory=policy.pin_memory,
        threads_per_rank=_threads_per_rank(recipe, machine, device, nproc),
        machine=machine,
        settings=recipe.settings(),
        sources=dict(sources or {}),
        derivations=derivations,
        notes=notes_for(
            recipe,
            machine,
            device=device,
            nproc=nproc,
            batch_size=batch_size,
        ),
    )
    batch_norm_notes = [
        f"If the model has BatchNorm: {note}." for note in single_sample_notes(plan, samples)
    ]
    return replace(plan, notes=(*plan.notes, *batch_norm_notes))


def device_of(recipe: Recipe, machine: Machine) -> Literal["cuda", "cpu"]:
    """Return the device that the ranks compute on: the recipe's, or else GPUs if there are any."""
    return recipe.device or ("cuda" if machine.num_gpus else "cpu")


def _ranks_per_node(
    recipe: Recipe, machine: Machine, nproc: int | None
) -> tuple[Literal["cuda", "cpu"], int]:
    """Return the device of the ranks, and the number of ranks on each node.

    Raises:
        PlanError: There are not enough GPUs, or the number is not positive.
    """
    device = device_of(recipe, machine)
    hostname = machine.hostname or "this machine"
    if nproc is not None and nproc < 1:
        raise PlanError(f"-n {nproc}: expected at least 1 rank per node.")
    if device == "cpu":
        return "cpu", nproc or CPU_RANKS
    if not machine.num_gpus:
        raise PlanError(
            f"device=cuda was asked for, and {hostname} has no GPU that this process may use. "
            "Leave device out to train on CPU ranks, or check `nvidia-smi` and "
            "CUDA_VISIBLE_DEVICES."
        )
    if nproc and nproc > machine.num_gpus:
        raise PlanError(
            f"{nproc} GPUs per node were asked for, and {hostname} has {machine.num_gpus}. Use "
            f"-n {machine.num_gpus} or less, more nodes, or device=cpu."
        )
    return "cuda", nproc or machine.num_gpus


def _batch_sizes(recipe: Recipe, world_size: int) -> list[int]:
    """Return the global batch size of each stage.

    Raises:
        PlanError: The milestones do not rise, or a batch has fewer samples than there are ranks.
    """
    first = recipe.batch_size or (recipe.batch_size_per_gpu or 0) * world_size
    if recipe.batch_tokens is not None:
        first = _samples_of_tokens(recipe.batch_tokens, recipe.tokens_per_sample)
    milestones = recipe.batch_milestones
    if any(later <= earlier for earlier, later in itertools.pairwise((0.0, *milestones, 1.0))):
        raise PlanError(
            f"batch_milestones={','.join(f'{milestone:g}' for milestone in milestones)}: expected "
            "rising fractions of the run between 0 and 1, such as 0.3,0.6."
        )
    try:
        growth = [recipe.batch_gamma**number for number in range(1, len(milestones) + 1)]
        sizes = [first, *(round(first * factor) for factor in growth)]
    except OverflowError:
        sizes = [INTEGER_LIMIT]
    if max(sizes) >= INTEGER_LIMIT:
        raise PlanError(
            f"A batch of {first} samples that grows by batch_gamma={recipe.batch_gamma:g} at "
            f"{len(milestones)} batch_milestones exceeds what 64 bits can count. Use a smaller one."
        )
    if recipe.virtual_ranks is not None:
        check_virtual_ranks(recipe, world_size, min(sizes))
    data_ranks = world_size // recipe.tensor_parallel
    if min(sizes) < data_ranks:
        unit = "rank" if recipe.tensor_parallel == 1 else "data rank"
        raise PlanError(
            f"batch_size={min(sizes)} is shared by {counted(data_ranks, unit)}, so that some would "
            f"have no sample. Use at most {counted(min(sizes), unit)}, or batch_size={data_ranks} "
            "or more."
        )
    return sizes


def _samples_of_tokens(batch_tokens: int, tokens_per_sample: int | None) -> int:
    """Return the samples of a batch that is stated in tokens.

    Raises:
        PlanError: The samples have no stated number of tokens, or do not add up to the batch.
    """
    if tokens_per_sample is None:
        raise PlanError(
            f"batch_tokens={batch_tokens} needs the number of tokens of a sample, which the recipe "
            "does not state. Give tokens_per_sample, or batch_size in samples."
        )
    samples, rest = divmod(batch_tokens, tokens_per_sample)
    if rest or not samples:
        lower = samples * tokens_per_sample
        nearest = f"{lower} or {lower + tokens_per_sample}" if samples else f"{tokens_per_sample}"
        raise PlanError(
            f"batch_tokens={batch_tokens} is not a multiple of tokens_per_sample="
            f"{tokens_per_sample}. Use batch_tokens={nearest}."
        )
    return samples


def _stages(
    recipe: Recipe, batch_sizes: Sequence[int], samples: int | None
) -> tuple[tuple[Stage, ...], int]:
    """Return the stages and the number of steps of the run.

    Raises:
        PlanError: A batch is larger than the training set, or epochs cannot be counted in steps.
    """
    largest = max(batch_sizes)
    if samples == 0:
        raise PlanError(
            "The training data is empty: its length is 0. Check what the recipe's data function "
            "reads."
        )
    if samples is not None and largest > samples:
        smaller = f"batch_size={samples} or less"
        if recipe.batch_milestones:
            smaller = "a smaller batch_gamma, or fewer batch_milestones"
        elif recipe.batch_tokens is not None and recipe.tokens_per_sample is not None:
            smaller = f"batch_tokens={samples * recipe.tokens_per_sample} or less"
        elif recipe.batch_size_per_gpu is not None:
            smaller = "a smaller batch_size_per_gpu, or fewer ranks"
        raise PlanError(
            f"A batch of {counted(largest, 'sample')} was asked for, and there "
            f"{'is' if samples == 1 else 'are'} {counted(samples, 'training sample')}. Use "
            f"{smaller}."
        )
    if recipe.steps is None and samples is None:
        raise PlanError(
            f"{recipe.name}: epochs={recipe.epochs} needs the number of training samples, which is "
            "unknown. Give train_samples, or steps instead of epochs."
        )
    stages, total_steps = make_stages(
        batch_sizes,
        recipe.batch_milestones,
        samples=samples,
        epochs=recipe.epochs,
        steps=recipe.steps,
    )
    if total_steps >= INTEGER_LIMIT:
        raise PlanError(
            f"{recipe.epochs or 0:,} epochs of {samples or 0:,} samples are more steps than can be "
            "counted in 64 bits. Use fewer epochs."
        )
    return stages, total_steps


def _check_max_time(recipe: Recipe) -> None:
    """Refuse a time limit for a run whose batch grows at fractions of its steps.

    Raises:
        PlanError: The recipe has both.
    """
    if recipe.max_time is not None and recipe.batch_milestones:
        raise PlanError(
            f"max_time={recipe.max_time} sets the number of steps from the speed of the first "
            "ones, and batch_milestones are fractions of that number at which the batch, and with "
            "it the speed, changes. Use one of them."
        )


def _check_data_on_device(recipe: Recipe) -> None:
    """Refuse workers for data that lies on the device.

    Raises:
        PlanError: The recipe has both.
    """
    if recipe.data_on_device and recipe.num_workers:
        raise PlanError(
            f"num_workers={recipe.num_workers} with data_on_device=true: batches are made on the "
            "device, and DataLoader workers would have nothing to read. Remove one of them."
        )


def _micro_batch(batch_size: int, world_size: int, limit: int) -> int:
    """Return the size of the largest micro-batch of any rank, with as few micro-steps as possible.

    Args:
        batch_size: Samples in the global batch.
        world_size: Number of ranks.
        limit: Maximum size of a micro-batch.
    """
    share = ceil_div(batch_size, world_size)
    return ceil_div(share, ceil_div(share, limit))


def _samples_per_rank(
    batch_size: int, distribution: VirtualRanks, tensor_parallel: int
) -> tuple[int, ...]:
    """Return the samples that each rank takes of a batch.

    Args:
        batch_size: Samples in the batch.
        distribution: The distribution of its parts over the data ranks.
        tensor_parallel: Neighbouring ranks that take the same samples.
    """
    counts = shares(batch_size, distribution.count)
    if distribution.count != distribution.world_size:
        counts = tuple(
            sum(counts[virtual_rank] for virtual_rank in distribution.of_rank(rank))
            for rank in range(distribution.world_size)
        )
    return tuple(count for count in counts for _ in range(tensor_parallel))


def _threads_per_rank(recipe: Recipe, machine: Machine, device: str, nproc: int) -> int:
    """Return the CPU threads of each rank, which must not depend on the ranks of an exact run.

    CPU kernels divide their work by the number of threads, and add what the threads have summed.
    """
    if recipe.exact and (device == "cpu" or recipe.offload):
        return 1
    return max(machine.usable_cores // nproc, 1)


def _check_parts(recipe: Recipe, data_ranks: int, accumulation: int) -> None:
    """Refuse to measure the gradient noise if a batch has only one part to measure it by.

    Raises:
        PlanError: There is one part.
    """
    summed = STRATEGIES[recipe.strategy].sums_gradients_over_ranks_in_backward
    has_virtual_ranks = recipe.exact and recipe.virtual_ranks != 1
    if accumulation > 1 or (data_ranks > 1 and not summed) or has_virtual_ranks:
        return
    where = f"under strategy={recipe.strategy}" if summed else "on 1 rank"
    raise PlanError(
        f"noise_scale=true compares the gradients of parts of a batch, and {where} without "
        "accumulation there is one part. Use a micro_batch_size of at most half of a rank's share, "
        "which makes several parts and changes no step."
    )


def _lr_of(
    recipe: Recipe, batch_size: int, total_steps: int, stages: Sequence[Stage]
) -> tuple[float, str, LRPath | None]:
    """Return the peak learning rate, the arithmetic behind it, and its path over the run.

    The path is None if only the run computes it.

    Raises:
        PlanError: The learning rate does not follow from the recipe, or is not finite at a step.
    """
    lr, reason = _learning_rate(recipe, batch_size)
    if not recipe.schedule.is_planned:
        return lr, reason, None
    path = lr_path(recipe.schedule, total_steps, stages, recipe.lr_rule)
    if not math.isfinite(lr * path.highest):
        raise PlanError(
            f"The learning rate of step {path.peak_step:,} is not a finite number: {lr:g} times "
            f"{path.highest:g} by {recipe.schedule}. Use a smaller lr."
        )
    return lr, reason, path


def _objectives(
    recipe: Recipe, batch_size: int, total_steps: int, stages: Sequence[Stage]
) -> tuple[PlannedObjective, ...]:
    """Return the numbers of each objective; nothing if the recipe has one loss.

    Raises:
        PlanError: A learning rate does not follow from the recipe, or is not finite at a step.
    """
    planned = []
    for objective, alone in zip(recipe.objectives, recipe.by_objective(), strict=False):
        lr, reason, path = _lr_of(alone, batch_size, total_steps, stages)
        is_named = isinstance(alone.optimizer, OptimizerSpec)
        planned.append(
            PlannedObjective(
                name=objective.name,
                parameters=tuple(objective.parameters),
                every=objective.every,
                optimizer=str(alone.optimizer) if is_named else "built by the recipe",
                schedule=str(alone.schedule),
                lr=lr,
                lr_start=None if path is None else lr * path.start,
                lr_end=None if path is None else lr * path.end,
                lr_derivation=reason,
            )
        )
    return tuple(planned)


def _learning_rate(recipe: Recipe, batch_size: int) -> tuple[float, str]:
    """Return the peak learning rate, and the arithmetic behind it.

    Raises:
        PlanError: The recipe does not state the batch size that its learning rate is for.
    """
    reference = recipe.lr_batch_size
    if recipe.lr_rule == "none":
        return recipe.lr, f"{recipe.lr:g} at any batch size (lr_rule=none)"
    if reference is None:
        raise PlanError(
            f"lr={recipe.lr:g} was tuned for some batch size, and the recipe does not state which. "
            "Give lr_batch_size, or lr_rule=none to use this learning rate at any batch size."
        )
    lr = recipe.lr * lr_factor(batch_size / reference, recipe.lr_rule)
    if not 0 < lr < math.inf:
        raise PlanError(
            f"lr={recipe.lr:g} at lr_batch_size={reference} is {lr:g} at a batch of {batch_size} "
            f"samples by lr_rule={recipe.lr_rule}, which is beyond the range of numbers. Correct "
            "one of them."
        )
    if recipe.lr_rule == "sqrt":
        return lr, f"{lr:.6g} = {recipe.lr:g} x sqrt({batch_size} / {reference}), square root"
    return lr, f"{lr:.6g} = {recipe.lr:g} x {batch_size} / {reference}, linear"
