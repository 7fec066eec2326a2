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
"""The implementations of `launcher.engine.backends`."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to spread a model over ranks, as properties that the rest of the package asks for."""

    backend: Backend
    """The backend that carries it out where there are several ranks."""

    title: str
    """The name that a plan shows."""

    zero_stage: int = 0
    """DeepSpeed's number for it; 0 where DeepSpeed has no part in it."""

    shards_optimizer_state: bool = False
    """Whether each rank holds a part of the optimizer state, and updates a part of the weights."""

    shards_gradients: bool = False
    """Whether each rank holds a part of the gradients, which are reduced after every micro-step."""

    shards_parameters: bool = False
    """Whether each rank holds a part of the weights, which are gathered where they are used."""

    needs_several_ranks: bool = False
    """Whether it cannot run on one rank."""

    sums_gradients_over_ranks_in_backward: bool = False
    """Whether backward leaves no gradient of this rank alone, which noise could be measured by."""

    gathers_parameters_in_autocast_dtype: bool = False
    """Whether ranks send each other weights in the dtype of `Recipe.precision`, and not in fp32."""

    @property
    def shards(self) -> bool:
        """Return whether each rank holds only a part of something."""
        return self.shards_optimizer_state or self.shards_gradients or self.shards_parameters

    @property
    def sharded(self) -> str:
        """Return what each rank holds only a part of, as text; empty where that is nothing."""
        parts = {
            "weights": self.shards_parameters,
            "gradients": self.shards_gradients,
            "optimizer state": self.shards_optimizer_state,
        }
        *first, last = [name for name, is_sharded in parts.items() if is_sharded] or [""]
        return f"{', '.join(first)} and {last}" if first else last

    @property
    def uses_deepspeed(self) -> bool:
        """Return whether DeepSpeed carries it out."""
        return self.backend == "deepspeed"

    @property
    def uses_fsdp(self) -> bool:
        """Return whether torch's FSDP2 carries it out."""
        return self.backend == "fsdp"


STRATEGIES = {
    "ddp": Strategy(backend="ddp", title="DDP"),
    "fsdp": Strategy(
        backend="fsdp",
        title="FSDP",
        shards_optimizer_state=True,
        shards_gradients=True,
        shards_parameters=True,
        needs_several_ranks=True,
        sums_gradients_over_ranks_in_backward=True,
        gathers_parameters_in_autocast_dtype=True,
    ),
    "zero1": Strategy(
        backend="deepspeed",
        title="DeepSpeed ZeRO-1",
        zero_stage=1,
        shards_optimizer_state=True,
    ),
    "zero2": Strategy(
        backend="deepspeed",
        title="DeepSpeed ZeRO-2",
        zero_stage=2,
        shards_optimizer_state=True,
        shards_gradients=True,
    ),
    "zero3": Strategy(
        backend="deepspeed",
        title="DeepSpeed ZeRO-3",
        zero_stage=3,
        shards_optimizer_state=True,
        shards_gradients=True,
        shards_parameters=True,
    ),
}
"""The strategies by the names that `Recipe.strategy` takes."""


def backend_for(recipe: Recipe, world_size: int) -> Backend:
    """Return what carries out the recipe's strategy on `world_size` ranks."""
    strategy = STRATEGIES[recipe.strategy]
    return strategy.backend if strategy.shards or world_size > 1 else "local"


def check_strategy(recipe: Recipe, machine: Machine, device: str, world_size: int) -> None:
    """Refuse a strategy or an option that cannot run.

    Raises:
        PlanError: It says what is missing or what contradicts what, and what to do.
    """
    strategy = STRATEGIES[recipe.strategy]
    if strategy.needs_several_ranks and world_size == 1:
        raise PlanError(
            f"strategy={recipe.strategy} shards the weights over ranks, and there is 1 rank. Use "
            "strategy=ddp, which is plain training on one rank, strategy=zero2 offload=cpu to save "
            "GPU memory, or -n 2 or more."
        )
    if strategy.uses_deepspeed and not machine.has_deepspeed:
        raise PlanError(
            f"strategy={recipe.strategy} is DeepSpeed's, and DeepSpeed is not installed. "
            "`python -m pip install deepspeed`, or use strategy=fsdp, which needs nothing more."
        )
    if recipe.precision == "fp64" and strategy.uses_deepspeed:
        raise PlanError(
            f"strategy={recipe.strategy} is DeepSpeed's, which keeps weights in fp32, and "
            "precision=fp64 was asked for. Use strategy=ddp or strategy=fsdp."
        )
    if recipe.offload is not None and not strategy.shards:
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
