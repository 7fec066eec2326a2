"""The plan of a run: every derived number, before any GPU is asked for.

A `Plan` is computed from a recipe, a machine and a number of ranks, and from nothing else. Printing
it is what `launcher plan` does; `launcher run` starts ranks that refuse to train if the world that
they find is another. Every refusal of numbers that do not go together is in this module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from launcher.batch import ceil_div, num_micro_steps, shares
from launcher.errors import PlanError, WorldError
from launcher.loading import loader_policy
from launcher.machine import Machine
from launcher.reasons import batch_arithmetic, notes_for, ranks_text, steps_arithmetic
from launcher.recipe import Recipe
from launcher.schedule import Schedule
from launcher.strategy import Backend, backend_for, check_strategy, speed_ups
from launcher.world import World

CPU_RANKS = 2
"""Ranks per node where there is no GPU and no number was asked for."""

_OF_THE_NODE = (
    "num_workers",
    "workers_per_rank",
    "prefetch_factor",
    "pin_memory",
    "threads_per_rank",
)
"""What may differ between ranks that take the same steps."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number of a run that follows from its recipe and the ranks it has."""

    recipe: str
    """The recipe's name."""

    nodes: int
    nproc_per_node: int
    """Ranks on each node."""

    world_size: int
    """Ranks in all."""

    device: Literal["cuda", "cpu"]
    strategy: str
    """What is sharded over the ranks, one of `launcher.strategy.STRATEGIES`."""

    backend: Backend
    """What carries the strategy out; one process under ddp is `local`, without a process group."""

    batch_size: int
    """Samples per optimizer step, over all ranks and accumulation steps."""

    samples_per_rank: tuple[int, ...]
    """Samples of a full batch that each rank takes."""

    micro_batch_size: int
    """The most samples that go through the model at once on one rank."""

    accumulation_steps: int
    """Micro-batches that each rank takes per optimizer step."""

    lr: float
    """Peak learning rate, scaled to the batch."""

    lr_start: float
    lr_end: float
    lr_peak_step: int
    """The first step with the highest learning rate, counted from 1."""

    total_steps: int
    steps_per_epoch: int | None
    """Optimizer steps in a pass over the data, the last possibly shorter; None where unknown."""

    train_samples: int | None
    evaluate_every: int | None
    """Steps between evaluations; None where it is an epoch and its length is unknown."""

    seed: int
    precision: str
    speed_ups: tuple[str, ...]
    """The settings for speed or memory that are on."""

    workers_per_rank: int
    prefetch_factor: int | None
    pin_memory: bool
    threads_per_rank: int
    """CPU threads that each rank computes with."""

    machine: Machine
    """The machine that each node was taken to be."""

    settings: Mapping[str, Any]
    """The recipe's settings, overrides applied."""

    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each setting came from."""

    reasons: Mapping[str, str] = field(default_factory=dict)
    """The arithmetic or the reason behind derived numbers, by name."""

    notes: tuple[str, ...] = ()
    """What a reader should know: what depends on the number of ranks, what is unusual."""

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values that JSON and YAML can hold."""
        values = asdict(self)
        return values | {
            "samples_per_rank": list(self.samples_per_rank),
            "speed_ups": list(self.speed_ups),
            "notes": list(self.notes),
        }

    def evaluates_after(self, step: int) -> bool:
        """Return whether the evaluation data is visited after `step`, counted from 0."""
        done = step + 1
        return done == self.total_steps or (
            self.evaluate_every is not None and done % self.evaluate_every == 0
        )

    def check_world(self, world: World) -> None:
        """Refuse a world other than the planned one.

        Raises:
            WorldError: The number of ranks, or of ranks per node, is not as planned.
        """
        planned = (self.nodes, self.nproc_per_node)
        found = (world.nodes, world.local_world_size)
        if found != planned:
            raise WorldError(
                f"Planned for {self.world_size} ranks ({ranks_text(*planned)}); "
                f"found {world.world_size} ({ranks_text(*found)}). Nothing was trained. Start "
                "as many ranks as were planned, or plan again for these."
            )

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return what would make ranks with this plan and `other` take different steps."""
        own = self.agreement()
        return {
            name: (own.get(name), other.get(name))
            for name in sorted(own.keys() | other.keys())
            if own.get(name) != other.get(name)
        }

    def agreement(self) -> dict[str, Any]:
        """Return the values that must be the same on every rank."""
        derived = ("machine", "sources", "reasons", "notes", "settings", "samples_per_rank")
        values = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in (*derived, *_OF_THE_NODE)
        }
        kept = {name: value for name, value in self.settings.items() if name not in _OF_THE_NODE}
        return values | kept


def make_plan(
    recipe: Recipe,
    machine: Machine,
    *,
    nodes: int = 1,
    nproc_per_node: int | None = None,
    train_samples: int | None = None,
    sources: Mapping[str, str] | None = None,
) -> Plan:
    """Work out a run of `recipe` on `nodes` machines like `machine`.

    Args:
        recipe: What to train.
        machine: What each node offers.
        nodes: Number of nodes.
        nproc_per_node: Ranks on each; None is one per GPU, or `CPU_RANKS` without GPUs.
        train_samples: Training samples where the recipe does not say; only `epochs` needs them.
        sources: Where each setting came from, for the reader.

    Raises:
        PlanError: The numbers do not go together, or ask for more than there is.
    """
    device, nproc = _ranks_per_node(recipe, machine, nproc_per_node)
    world_size = nodes * nproc
    check_strategy(recipe, machine, device, world_size)
    batch_size = _batch_size(recipe, world_size)
    samples = recipe.train_samples or train_samples
    steps_per_epoch, total_steps = _steps(recipe, batch_size, samples)
    micro_limit = recipe.micro_batch_size or ceil_div(batch_size, world_size)
    accumulation = num_micro_steps(batch_size, world_size, micro_limit)
    micro = ceil_div(ceil_div(batch_size, world_size), accumulation)
    if recipe.noise_scale:
        _check_parts(recipe, world_size, accumulation)
    lr, lr_reason = _learning_rate(recipe, batch_size)
    start, end, peak_step = _lr_path(recipe.schedule, total_steps)
    policy = loader_policy(
        usable_cores=machine.usable_cores,
        cores_limited_by=machine.cores_limited_by,
        nproc_per_node=nproc,
        device=device,
        in_memory=recipe.in_memory,
        num_workers=recipe.num_workers,
        prefetch_factor=recipe.prefetch_factor,
        pin_memory=recipe.pin_memory,
    )
    unit = "GPU" if device == "cuda" else "CPU rank"
    reasons = {
        "batch_size": batch_arithmetic(batch_size, nodes, nproc, unit, micro, accumulation),
        "lr": lr_reason,
        "total_steps": steps_arithmetic(recipe, batch_size, samples, steps_per_epoch, total_steps),
        "workers_per_rank": policy.workers_reason,
        "pin_memory": policy.pin_reason,
    }
    return Plan(
        recipe=recipe.name,
        nodes=nodes,
        nproc_per_node=nproc,
        world_size=world_size,
        device=device,
        strategy=recipe.strategy,
        backend=backend_for(recipe, world_size),
        batch_size=batch_size,
        samples_per_rank=shares(batch_size, world_size),
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        lr=lr,
        lr_start=lr * start,
        lr_end=lr * end,
        lr_peak_step=peak_step,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        train_samples=samples,
        evaluate_every=recipe.evaluate_every or steps_per_epoch,
        seed=recipe.seed,
        precision=recipe.precision,
        speed_ups=speed_ups(recipe, device),
        workers_per_rank=policy.workers_per_rank,
        prefetch_factor=policy.prefetch_factor,
        pin_memory=policy.pin_memory,
        threads_per_rank=max(machine.usable_cores // nproc, 1),
        machine=machine,
        settings=recipe.settings(),
        sources=dict(sources or {}),
        reasons=reasons,
        notes=notes_for(
            recipe,
            machine,
            device=device,
            nproc=nproc,
            world_size=world_size,
            micro=micro,
            batch_size=batch_size,
        ),
    )


def device_of(recipe: Recipe, machine: Machine) -> Literal["cuda", "cpu"]:
    """Return what the ranks compute on: what the recipe says, or GPUs where there are any."""
    return recipe.device or ("cuda" if machine.num_gpus else "cpu")


def _ranks_per_node(
    recipe: Recipe, machine: Machine, asked: int | None
) -> tuple[Literal["cuda", "cpu"], int]:
    device = device_of(recipe, machine)
    if asked is not None and asked < 1:
        raise PlanError(f"-n {asked}: expected at least 1 rank per node.")
    if device == "cpu":
        return "cpu", asked or CPU_RANKS
    if not machine.num_gpus:
        raise PlanError(
            f"device=cuda was asked for, and {machine.hostname or 'this machine'} has no GPU that "
            "this process may use. Leave device out to train on CPU ranks, or look at `nvidia-smi` "
            "and CUDA_VISIBLE_DEVICES."
        )
    if asked and asked > machine.num_gpus:
        raise PlanError(
            f"{asked} GPUs per node were asked for, and {machine.hostname or 'this machine'} has "
            f"{machine.num_gpus}. Use -n {machine.num_gpus} or less, more nodes, or device=cpu."
        )
    return "cuda", asked or machine.num_gpus


def _batch_size(recipe: Recipe, world_size: int) -> int:
    if recipe.batch_size_per_gpu is not None:
        return recipe.batch_size_per_gpu * world_size
    assert recipe.batch_size is not None
    if recipe.batch_size < world_size:
        raise PlanError(
            f"batch_size={recipe.batch_size} is shared by {world_size} ranks, so some would have "
            f"no sample. Use at most {recipe.batch_size} ranks, or batch_size={world_size} or more."
        )
    return recipe.batch_size


def _steps(recipe: Recipe, batch_size: int, samples: int | None) -> tuple[int | None, int]:
    if samples is not None and batch_size > samples:
        raise PlanError(
            f"A batch of {batch_size} samples was asked for, and there are {samples:,} training "
            f"samples. Use batch_size={samples} or less, or fewer ranks with batch_size_per_gpu."
        )
    steps_per_epoch = ceil_div(samples, batch_size) if samples is not None else None
    if recipe.steps is not None:
        return steps_per_epoch, recipe.steps
    if steps_per_epoch is None:
        raise PlanError(
            f"{recipe.name}: epochs={recipe.epochs} is a number of steps only with the number of "
            "training samples. Give train_samples, or steps instead of epochs."
        )
    assert recipe.epochs is not None
    return steps_per_epoch, recipe.epochs * steps_per_epoch


def _check_parts(recipe: Recipe, world_size: int, accumulation: int) -> None:
    """Refuse to measure the gradient noise where a batch has only one part."""
    summed = recipe.strategy == "fsdp"
    if accumulation > 1 or (world_size > 1 and not summed):
        return
    where = "under strategy=fsdp" if summed else "on 1 rank"
    raise PlanError(
        f"noise_scale=true compares the gradients of parts of a batch, and {where} without "
        "accumulation there is one part. A smaller micro_batch_size, half of the rank's share or "
        "less, makes several and changes no step."
    )


def _learning_rate(recipe: Recipe, batch_size: int) -> tuple[float, str]:
    """Return the peak learning rate and its arithmetic.

    Linear: Goyal et al., arXiv:1706.02677. Square root: Krizhevsky, arXiv:1404.5997.
    """
    reference = recipe.lr_batch_size
    if recipe.lr_rule == "none":
        return recipe.lr, f"{recipe.lr:g}, whatever the batch (lr_rule=none)"
    if reference is None:
        raise PlanError(
            f"lr={recipe.lr:g} was found at some batch size, and the recipe does not say which. "
            "Give lr_batch_size, or lr_rule=none to use this number whatever the batch."
        )
    ratio = batch_size / reference
    if recipe.lr_rule == "sqrt":
        lr = recipe.lr * math.sqrt(ratio)
        return lr, f"{lr:.6g} = {recipe.lr:g} x sqrt({batch_size} / {reference}), square root"
    lr = recipe.lr * ratio
    return lr, f"{lr:.6g} = {recipe.lr:g} x {batch_size} / {reference}, linear"


def _lr_path(schedule: Schedule, total_steps: int) -> tuple[float, float, int]:
    """Return the factors of the first and the last step, and the step of the highest from 1."""
    stride = max(total_steps // 1_000, 1)
    sampled = range(0, total_steps, stride)
    near = max(sampled, key=lambda step: schedule.at(step, total_steps).factor)
    window = range(max(near - stride + 1, 0), min(near + stride, total_steps))
    peak = max(window, key=lambda step: schedule.at(step, total_steps).factor)
    first, last = schedule.at(0, total_steps), schedule.at(total_steps - 1, total_steps)
    return first.factor, last.factor, peak + 1
