"""The strategies: how weights, gradients and optimizer state are distributed over ranks.

A strategy determines where tensors are kept and what ranks send each other, not what they compute.
Combinations that cannot run are refused here, before any process starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.environment.machine import Machine
from launcher.errors import PlanError
from launcher.planning.fsdp_settings import check_fsdp_settings
from launcher.planning.number_formats import check_number_formats
from launcher.planning.virtual_ranks import VirtualRanks
from launcher.recipe.recipe import Recipe

Backend = Literal["local", "ddp", "fsdp", "deepspeed"]
"""The implementations of `launcher.engine.backends`."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A way to distribute a model over ranks, described by properties."""

    backend: Backend
    """The implementation of the strategy on several ranks."""

    title: str
    """Name of the strategy for readers of a plan."""

    zero_stage: int = 0
    """DeepSpeed's ZeRO stage; 0 if the strategy does not use DeepSpeed."""

    shards_optimizer_state: bool = False
    """Whether each rank holds a part of the optimizer state, and updates a part of the weights."""

    shards_gradients: bool = False
    """Whether each rank holds a part of the gradients, which are reduced in every micro-step."""

    shards_parameters: bool = False
    """Whether each rank holds a part of the weights, which are gathered when they are used."""

    needs_several_ranks: bool = False
    """Whether the strategy cannot run on a single rank."""

    sums_gradients_over_ranks_in_backward: bool = False
    """Whether backward leaves only sums over ranks, and no gradient of one rank to measure noise
    with."""

    gathers_parameters_in_autocast_dtype: bool = False
    """Whether weights are gathered in the dtype of `Recipe.precision` instead of fp32."""

    @property
    def shards(self) -> bool:
        """Return whether anything is sharded over the ranks."""
        return self.shards_optimizer_state or self.shards_gradients or self.shards_parameters

    @property
    def sharded(self) -> str:
        """Return the names of what is sharded, as text; empty if nothing is."""
        parts = {
            "weights": self.shards_parameters,
            "gradients": self.shards_gradients,
            "optimizer state": self.shards_optimizer_state,
        }
        *first, last = [name for name, is_sharded in parts.items() if is_sharded] or [""]
        return f"{', '.join(first)} and {last}" if first else last

    @property
    def uses_deepspeed(self) -> bool:
        """Return whether DeepSpeed implements the strategy."""
        return self.backend == "deepspeed"

    @property
    def uses_fsdp(self) -> bool:
        """Return whether torch's FSDP2 implements the strategy."""
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
    """Return the implementation of the recipe's strategy on `world_size` ranks."""
    strategy = STRATEGIES[recipe.strategy]
    return strategy.backend if strategy.shards or world_size > 1 else "local"


def check_strategy(recipe: Recipe, machine: Machine, device: str, world_size: int) -> None:
    """Refuse a strategy or a related setting that cannot run.

    Args:
        recipe: The recipe with the settings.
        machine: The machine that each node is taken to be.
        device: `cuda` or `cpu`.
        world_size: Number of ranks.

    Raises:
        PlanError: Something is not installed, or two settings contradict each other.
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
            f"strategy={recipe.strategy} uses DeepSpeed, and DeepSpeed is not installed. Install "
            "it with `python -m pip install deepspeed`, or use strategy=fsdp, which needs no "
            "further package."
        )
    if recipe.precision == "fp64" and strategy.uses_deepspeed:
        raise PlanError(
            f"strategy={recipe.strategy} uses DeepSpeed, which keeps weights in fp32, and "
            "precision=fp64 was asked for. Use strategy=ddp or strategy=fsdp."
        )
    if recipe.offload is not None and not strategy.shards:
        raise PlanError(
            f"offload={recipe.offload} moves what the strategy shards to host memory, and "
            f"strategy={recipe.strategy} shards nothing. Use strategy=fsdp or strategy=zero2, or "
            "leave offload out."
        )
    check_fsdp_settings(recipe, uses_fsdp=strategy.uses_fsdp)
    if recipe.exact:
        _check_exact(recipe)
    if recipe.tensor_parallel > 1:
        _check_tensor_parallel_settings(recipe)
    _check_objectives(recipe)
    for alone in recipe.by_objective():
        check_number_formats(alone, strategy, machine, device, world_size)
    if recipe.deterministic and recipe.cudnn_benchmark:
        raise PlanError(
            "deterministic=true needs the same kernels in every run, and cudnn_benchmark=true "
            "chooses them by their time. Leave one of them out."
        )
    if recipe.compile and device == "cpu" and not machine.has_compiler:
        raise PlanError(
            "compile=true on CPUs needs a C++ compiler, and none of $CXX, g++ and clang++ is on "
            "PATH. Install one (Debian: `apt-get install g++`), or leave compile out."
        )


def distribute(
    virtual_ranks: int | None,
    world_size: int,
    strategy: str,
    *,
    exact: bool,
    shard_size: int | None = None,
) -> VirtualRanks:
    """Return how the parts of a batch are distributed over ranks.

    Args:
        virtual_ranks: `Recipe.virtual_ranks`; None is one part per rank.
        world_size: Number of ranks.
        strategy: Name of the strategy. FSDP reduces gradients over the ranks in every micro-step,
            so an exact sum needs ranks that compute neighbouring virtual ranks at the same time.
        exact: `Recipe.exact`.
        shard_size: Ranks that share the shards of a weight under FSDP; None is all of them.
    """
    interleaved = exact and STRATEGIES[strategy].uses_fsdp
    return VirtualRanks(
        count=virtual_ranks or world_size,
        world_size=world_size,
        interleaved=interleaved,
        groups=world_size // (shard_size or world_size) if interleaved else 1,
    )


def check_virtual_ranks(recipe: Recipe, world_size: int, smallest_batch: int) -> None:
    """Refuse virtual ranks that cannot share the batch, or be shared by the ranks.

    Args:
        recipe: The recipe, which has virtual ranks.
        world_size: Number of ranks.
        smallest_batch: Samples of the smallest full batch.

    Raises:
        PlanError: There are more ranks than virtual ranks or fewer samples than virtual ranks, or
            another setting contradicts them.
    """
    count = recipe.virtual_ranks or world_size
    if recipe.batch_size_per_gpu is not None:
        raise PlanError(
            f"virtual_ranks={count} fixes how a batch is split on any number of GPUs, and "
            f"batch_size_per_gpu={recipe.batch_size_per_gpu} makes the batch depend on that "
            "number. Use batch_size."
        )
    if world_size > count:
        raise PlanError(
            f"virtual_ranks={count} are shared by at most {count} ranks, and {world_size} were "
            f"asked for. Use -n {count} or less, or virtual_ranks={world_size} or more, which is "
            "another training."
        )
    if smallest_batch < count:
        raise PlanError(
            f"batch_size={smallest_batch} is shared by virtual_ranks={count}, so that some would "
            f"have no sample. Use virtual_ranks={smallest_batch} or less, or batch_size={count} or "
            "more."
        )
    if recipe.sync_batchnorm:
        raise PlanError(
            "sync_batchnorm=true computes BatchNorm's statistics over the micro-batches of all "
            f"ranks, and virtual_ranks={count} over that of one virtual rank. Leave one of them "
            "out."
        )
    if recipe.rank_buffers != "refuse":
        raise PlanError(
            f"rank_buffers={recipe.rank_buffers} synchronises buffers over ranks after each step, "
            f"and with virtual_ranks={count} a rank computes several parts in between. Leave one "
            "of them out."
        )


def _check_exact(recipe: Recipe) -> None:
    """Refuse exact sums where they cannot hold.

    Raises:
        PlanError: The recipe has no virtual ranks, or a setting rules out equal bits.
    """
    if recipe.virtual_ranks is None:
        raise PlanError(
            "exact=true makes the weights equal to the bit on any number of ranks, for which "
            "every batch is split into the same parts. Give their number, such as virtual_ranks=8: "
            "the largest number of ranks that the recipe may run on."
        )
    if STRATEGIES[recipe.strategy].uses_deepspeed:
        raise PlanError(
            f"exact=true sums gradients in a fixed order, and under strategy={recipe.strategy} "
            "DeepSpeed sums them in an order that depends on the number of ranks. Use strategy=ddp "
            "or strategy=fsdp, or virtual_ranks without exact."
        )
    if recipe.cudnn_benchmark:
        raise PlanError(
            "exact=true needs the same kernels in every run, and cudnn_benchmark=true chooses "
            "them by their time. Leave one of them out."
        )


def _check_objectives(recipe: Recipe) -> None:
    """Refuse several objectives where their turns cannot be kept apart.

    Raises:
        PlanError: The strategy or a setting knows one optimizer alone.
    """
    if not recipe.objectives:
        return
    names = ", ".join(objective.name for objective in recipe.objectives)
    if STRATEGIES[recipe.strategy].uses_deepspeed:
        raise PlanError(
            f"The recipe has the objectives {names}, each with an optimizer of its own, and under "
            f"strategy={recipe.strategy} a DeepSpeed engine has one optimizer, which updates all "
            "weights in each step. Use strategy=fsdp, which shards as much, or strategy=ddp."
        )
    if recipe.noise_scale:
        raise PlanError(
            "noise_scale=true measures the noise of one gradient, and the recipe has the "
            f"objectives {names}, each with a gradient of its own. Leave noise_scale out."
        )


def check_tensor_parallel(recipe: Recipe, nproc: int) -> None:
    """Refuse tensor-parallel groups that would cross a node, or that leave ranks over.

    A group exchanges activations several times in each layer, which needs the links inside a node.

    Args:
        recipe: The recipe.
        nproc: Ranks on each node.

    Raises:
        PlanError: `Recipe.tensor_parallel` does not divide the ranks of a node.
    """
    size = recipe.tensor_parallel
    if nproc % size == 0:
        return
    possible = [str(number) for number in range(1, nproc + 1) if nproc % number == 0]
    sizes = possible[0] if len(possible) == 1 else f"{', '.join(possible[:-1])} or {possible[-1]}"
    raise PlanError(
        f"tensor_parallel={size} splits each layer over {size} neighbouring ranks of one node, and "
        f"a node has {nproc} rank{'s' * (nproc > 1)}. Use tensor_parallel={sizes}, or a multiple "
        f"of {size} ranks per node (-n {size})."
    )


def _check_tensor_parallel_settings(recipe: Recipe) -> None:
    """Refuse tensor parallelism where another setting rules it out.

    Raises:
        PlanError: Another setting rules it out.
    """
    asked = f"tensor_parallel={recipe.tensor_parallel}"
    if not STRATEGIES[recipe.strategy].uses_fsdp:
        raise PlanError(
            f"{asked} splits layers over ranks, which works together with strategy=fsdp, and "
            f"strategy={recipe.strategy} was asked for. DistributedDataParallel and DeepSpeed take "
            "no weights that are split in this way. Use strategy=fsdp, or leave tensor_parallel "
            "out."
        )
    if recipe.virtual_ranks is not None:
        raise PlanError(
            f"virtual_ranks={recipe.virtual_ranks} draws the same dropout masks on any number of "
            f"ranks, and sums gradients in one order if exact=true. With {asked} each rank draws "
            "masks for its part of a layer, and the ranks of a group add parts of each product. "
            "Leave one of them out."
        )
    if recipe.sync_batchnorm:
        raise PlanError(
            "sync_batchnorm=true computes BatchNorm's statistics over all ranks, and with "
            f"{asked} several ranks have the same samples, which would count several times. Leave "
            "one of them out."
        )


def performance_flags(recipe: Recipe, device: str) -> tuple[str, ...]:
    """Return the settings for speed or memory that are enabled, as they are written.

    Args:
        recipe: The recipe with the settings.
        device: `cuda` or `cpu`; settings that only affect GPUs are omitted on a CPU.
    """
    switches = ["compile", "activation_checkpointing", "channels_last"]
    if device == "cuda":
        switches += ["fp8", "tf32", "cudnn_benchmark"]
    flags = [f"precision={recipe.precision}"] if recipe.precision in ("bf16", "fp16") else []
    flags += [f"param_dtype={recipe.param_dtype}"] if recipe.param_dtype != "fp32" else []
    flags += [f"offload={recipe.offload}"] if recipe.offload else []
    return (*flags, *(name for name in switches if getattr(recipe, name)))
