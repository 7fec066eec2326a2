"""What decides how much memory a rank needs: the sizes of a model, and the settings of a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.planning.virtual_ranks import VirtualRanks

GRADIENT_BYTES = 4
"""Bytes of a value of a gradient that is communicated: gradients are reduced in fp32."""


@dataclass(frozen=True, kw_only=True)
class ParameterMemory:
    """The sizes of a parameter and of the optimizer's state for it, unsharded."""

    rows: int
    """Size of the first dimension, along which FSDP shards, of the part that a tensor-parallel rank
    holds; 1 for a scalar."""

    values: int
    """Number of values."""

    parts: int = 1
    """Number of tensor-parallel ranks that each hold a part of it."""

    num_bytes: int
    """Bytes of the weight."""

    gradient_bytes: int
    """Bytes of its gradient; 0 if it is not trained."""

    block: int | None = None
    """Index of the block that it belongs to; None outside of blocks."""

    state_bytes: int = 0
    """Bytes of the optimizer's state of the weight's shape, which is sharded as the weight is."""

    fixed_state_bytes: int = 0
    """Bytes of other state, such as a step count, which is not sharded."""

    @property
    def is_trained(self) -> bool:
        """Return whether it has a gradient."""
        return self.gradient_bytes > 0

    def part(self) -> ParameterMemory:
        """Return the part of one tensor-parallel rank."""
        return replace(
            self,
            parts=1,
            values=self.values // self.parts,
            num_bytes=self.num_bytes // self.parts,
            gradient_bytes=self.gradient_bytes // self.parts,
            state_bytes=self.state_bytes // self.parts,
        )


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """What forward and backward allocate besides gradients, at most at any time."""

    fixed_bytes: float
    """Bytes that do not depend on the number of samples."""

    bytes_per_sample: float

    cast_bytes: int = 0
    """Bytes of the copies of weights that autocast makes in half precision."""

    def of(self, micro_batch_size: int) -> int:
        """Return the bytes of a micro-batch, without copies of weights."""
        return max(int(self.fixed_bytes + self.bytes_per_sample * micro_batch_size), 0)


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """The sizes of the tensors of a model and its training, as they are without sharding."""

    parameters: tuple[ParameterMemory, ...]

    buffer_bytes: int = 0
    """Bytes of the model's buffers, which every rank has."""

    sample_bytes: int = 0
    """Bytes of one sample in a batch; 0 if no sample could be read."""

    activations: ActivationMemory | None = None
    """Activations of forward and backward; None if they could not be estimated."""

    checkpointed: ActivationMemory | None = None
    """The same with activation_checkpointing; None if the model has no blocks."""

    notes: tuple[str, ...] = ()
    """Notes for the reader: what could not be found out, and why."""

    @property
    def num_values(self) -> int:
        """Return the number of weights."""
        return sum(parameter.values for parameter in self.parameters)

    @property
    def num_trained(self) -> int:
        """Return the number of trained weights."""
        return sum(parameter.values for parameter in self.parameters if parameter.is_trained)


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """memory.json: what decides how much memory a rank needs, and has."""

    model: ModelMemory
    """The sizes of the model."""

    refused: dict[str, str]
    """Why the optimizer cannot be used, by the names of the strategies for which it cannot."""

    device_bytes: int | None
    """Memory of the smallest GPU of this machine; None without GPUs, and for CPU ranks."""


@dataclass(frozen=True, kw_only=True)
class FSDPMemory:
    """The settings of FSDP alone that decide how much memory a rank needs."""

    reshard_after_forward: bool = True
    accumulate_unsharded: bool = False
    prefetch_blocks: int = 0

    reduce_bytes: int = GRADIENT_BYTES
    """Bytes of a value of a gradient that is reduced."""

    copies: int = 1
    """Groups of ranks that each hold all weights."""


@dataclass(frozen=True, kw_only=True)
class MemoryLayout:
    """The settings of a plan that decide how much memory a rank needs, and where."""

    strategy: str
    """One of `launcher.planning.strategy.STRATEGIES`."""

    shard: str | int | None = None
    """`Recipe.shard` where there are several ways to shard; None elsewhere."""

    ranks: int
    """Ranks over which what the strategy shards is sharded."""

    is_local: bool = False
    """Whether there is one rank without a process group."""

    device: Literal["cuda", "cpu"]
    offload: bool = False
    precision: str = "fp32"
    micro_batch_size: int = 1
    activation_checkpointing: bool = False

    accumulates: bool = False
    """Whether a step has several micro-steps, so that gradients exist while forward runs."""

    fsdp: FSDPMemory = FSDPMemory()
    """The settings of FSDP alone."""

    distribution: VirtualRanks | None = None
    """How exact sums are distributed over ranks; None without exact sums."""

    averages: bool = False
    """Whether the weights are averaged over the steps."""

    prefetched_batches: int = 1
    """Micro-batches that a rank's workers hold ready in host memory."""

    nproc_per_node: int = 1
    """Ranks that share the memory of a host."""

    num_ranks: int = 1
    """Number of ranks."""

    data_ranks: int = 1
    """Ranks that share a batch, and that divide what each of them has when they save it."""

    @property
    def title(self) -> str:
        """Return the strategy, the ranks that share a shard, and offloading, as settings."""
        shard = "" if self.shard is None else f" shard={self.shard}"
        return f"{self.strategy}{shard}{' offload=cpu' if self.offload else ''}"


def layout_of(plan: Plan) -> MemoryLayout:
    """Return the layout of a plan."""
    settings = plan.settings
    strategy = STRATEGIES[plan.strategy]
    return MemoryLayout(
        strategy=plan.strategy,
        shard=settings.get("shard") if strategy.uses_fsdp and plan.nodes > 1 else None,
        ranks=plan.shards if strategy.shards else 1,
        is_local=plan.backend == "local",
        device=plan.device,
        offload=settings.get("offload") is not None,
        precision=plan.precision,
        micro_batch_size=plan.micro_batch_size,
        activation_checkpointing=bool(settings.get("activation_checkpointing")),
        accumulates=plan.accumulation_steps > 1 or len(plan.stages) > 1,
        distribution=plan.distribution if plan.exact else None,
        averages=settings.get("averaging") is not None,
        prefetched_batches=plan.workers_per_rank * (plan.prefetch_factor or 0) + 1,
        nproc_per_node=plan.nproc_per_node,
        num_ranks=plan.world_size,
        data_ranks=plan.data_ranks,
        fsdp=FSDPMemory(
            reshard_after_forward=settings.get("reshard_after_forward", True),
            accumulate_unsharded=settings.get("accumulate_unsharded", False),
            prefetch_blocks=settings.get("prefetch_blocks", 0),
            reduce_bytes=2 if settings.get("reduce_dtype") == "bf16" else GRADIENT_BYTES,
            copies=plan.data_ranks // plan.shards,
        ),
    )
