"""The strategies: how weights, gradients and optimizer state are spread over ranks.

A strategy changes where numbers lie and what is sent, never what is computed. What cannot run is
refused here, before any process starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.environment.machine import Machine
from launcher.errors import PlanError
from launcher.recipe.recipe import Recipe

Backend = Literal["local", "ddp", "fsdp", "deepspeed"]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to spread a model over ranks."""

    backend: Backend
    """What carries it out where there are several ranks."""

    title: str
    """Its name in a sentence."""

    sharded: str
    """What each rank holds only a part of."""

    zero_stage: int = 0
    """DeepSpeed's number for it."""


STRATEGIES = {
    "ddp": Strategy(backend="ddp", title="DDP", sharded=""),
    "fsdp": Strategy(
        backend="fsdp", title="FSDP", sharded="weights, gradients and optimizer state"
    ),
    "zero1": Strategy(
        backend="deepspeed", title="DeepSpeed ZeRO-1", sharded="optimizer state", zero_stage=1
    ),
    "zero2": Strategy(
        backend="deepspeed",
        title="DeepSpeed ZeRO-2",
        sharded="gradients and optimizer state",
        zero_stage=2,
    ),
    "zero3": Strategy(
        backend="deepspeed",
        title="DeepSpeed ZeRO-3",
        sharded="weights, gradients and optimizer state",
        zero_stage=3,
    ),
}
"""By the names that `Recipe.strategy` takes."""


def backend_for(recipe: Recipe, world_size: int) -> Backend:
    """Return what carries out the recipe's strategy on `world_size` ranks."""
    backend = STRATEGIES[recipe.strategy].backend
    return "local" if backend == "ddp" and world_size == 1 else backend


def check_strategy(recipe: Recipe, machine: Machine, device: str, world_size: int) -> None:
    """Refuse a strategy or an option that cannot run.

    Raises:
        PlanError: It says what is missing or what contradicts what, and what to do.
    """
    strategy = STRATEGIES[recipe.strategy]
    if strategy.backend == "fsdp" and world_size == 1:
        raise PlanError(
            "strategy=fsdp shards the weights over ranks, and there is 1 rank. Use strategy=ddp, "
            "which is plain training there, strategy=zero2 offload=cpu to save the GPU's memory, "
            "or -n 2 and more."
        )
    if strategy.backend == "deepspeed" and not machine.has_deepspeed:
        raise PlanError(
            f"strategy={recipe.strategy} is DeepSpeed's, and DeepSpeed is not installed. "
            "`python -m pip install deepspeed`, or use strategy=fsdp, which needs nothing more."
        )
    if recipe.precision == "fp64" and strategy.backend == "deepspeed":
        raise PlanError(
            f"strategy={recipe.strategy} is DeepSpeed's, which keeps weights in fp32, and "
            "precision=fp64 was asked for. Use strategy=ddp or strategy=fsdp."
        )
    if recipe.offload is not None and not strategy.sharded:
        raise PlanError(
            f"offload={recipe.offload} moves what a strategy shards out of the GPU, and "
            f"strategy={recipe.strategy} shards nothing. Use strategy=fsdp or strategy=zero2, or "
            "leave offload out."
        )
    if recipe.compile and device == "cpu" and not machine.has_compiler:
        raise PlanError(
            "compile=true on CPUs needs a C++ compiler, and there is none: neither $CXX nor g++ "
            "nor clang++ is on PATH. Install one (Debian: `apt-get install g++`), or leave compile "
            "out."
        )


def performance_flags(recipe: Recipe, device: str) -> tuple[str, ...]:
    """Return the settings for speed or memory that are on, as they are written."""
    flags = ["compile", "activation_checkpointing", "channels_last"]
    if device == "cuda":
        flags += ["tf32", "cudnn_benchmark"]
    on = [f"precision={recipe.precision}"] if recipe.precision in ("bf16", "fp16") else []
    on += [f"offload={recipe.offload}"] if recipe.offload else []
    return (*on, *(name for name in flags if getattr(recipe, name)))
