"""The memory of a rank under each strategy, computed from the sizes of a model's tensors.

Formulas: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(arXiv:1910.02054, section 3) for what a strategy shards, and torch's and DeepSpeed's own code for
the buffers that the paper leaves out. They count tensors. The CUDA context, the buffers of NCCL
and what an allocator loses to fragmentation come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from launcher.planning.configs import reduce_bucket_size
from launcher.planning.global_batch import ceil_div
from launcher.planning.memory_facts import (
    GRADIENT_BYTES,
    ActivationMemory,
    MemoryLayout,
    ModelMemory,
    ParameterMemory,
)
from launcher.planning.strategy import STRATEGIES

_HALF_PRECISIONS = ("bf16", "fp16")

_ZERO3_REUSE_VALUES = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance, in values. A gathered weight stays until backward if
forward and backward use fewer values than this in between, so the last half of it stays."""

_ZERO3_PREFETCH_VALUES = 50_000_000
"""DeepSpeed's stage3_prefetch_bucket_size, in values."""

_ZERO3_PERSISTENT_VALUES = 100_000
"""DeepSpeed's stage3_param_persistence_threshold: smaller weights stay on every rank."""


MemoryKind = Literal[
    "weights",
    "fp32 copies",
    "gradients",
    "optimizer state",
    "averaged weights",
    "gathered weights",
    "buffers of communication",
    "sums of the tree",
    "weights cast by autocast",
    "activations",
    "checkpoint snapshot",
    "batches",
]
"""What memory is used for."""

KINDS: tuple[MemoryKind, ...] = get_args(MemoryKind)
"""The kinds in the order of a table."""

ESTIMATED: tuple[MemoryKind, ...] = ("activations", "weights cast by autocast")
"""Kinds whose bytes are an estimate; the others follow from the sizes of tensors."""


@dataclass(frozen=True, kw_only=True)
class PlaceMemory:
    """The memory of a rank in one place: on its GPU, or on its host."""

    bytes_by_kind: dict[MemoryKind, int]
    """The most bytes of each kind at any time. Not all kinds are largest at the same time."""

    peak: int
    """The largest sum at any time."""

    training_peak: int
    """The largest sum while no checkpoint is saved."""

    certain_peak: int
    """The largest sum without what is estimated."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The memory of one rank: of the rank that needs most, where shards differ."""

    layout: MemoryLayout

    device: PlaceMemory
    """What is on the GPU; nothing for CPU ranks."""

    host: PlaceMemory
    """What is in host memory."""

    @property
    def place(self) -> PlaceMemory:
        """Return the memory of the place where the rank computes."""
        return self.device if self.layout.device == "cuda" else self.host

    @property
    def node_host_bytes(self) -> int:
        """Return the peak of the host memory of all ranks of a node."""
        return self.host.peak * self.layout.nproc_per_node


Phase = Literal["forward", "backward", "update", "save"]
"""A moment of a step at which the memory may be highest.

forward    the end of forward, when all activations exist, and the collectives that follow
backward   the end of backward, when no activations are left and all gradients exist
update     the optimizer's step
save       the copies of a checkpoint
"""

_PHASES: tuple[Phase, ...] = ("forward", "backward", "update", "save")
_PASSES: tuple[Phase, ...] = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    kind: MemoryKind
    num_bytes: int
    on_host: bool
    phases: tuple[Phase, ...]


class _Ledger:
    """Collects the memory of a rank.

    Args:
        model: The sizes of the model.
        layout: The strategy and the other settings.
    """

    def __init__(self, model: ModelMemory, layout: MemoryLayout) -> None:
        self.layout, self.ranks = layout, layout.ranks
        self.parameters = [item.part() for item in model.parameters]
        self.trained = [item for item in self.parameters if item.is_trained]
        self.state_bytes = sum(item.state_bytes for item in self.trained)
        self.fixed_bytes = sum(item.fixed_state_bytes for item in self.trained)
        self.on_cpu = layout.device == "cpu"
        self.gradient_phases: tuple[Phase, ...] = (
            ("forward", "backward", "update") if layout.accumulates else ("backward", "update")
        )
        """When gradients exist that a step makes anew."""

        self.entries: list[_Entry] = []

    def add(
        self,
        kind: MemoryKind,
        num_bytes: float,
        phases: tuple[Phase, ...] = _PHASES,
        *,
        on_host: bool = False,
    ) -> None:
        """Add memory that is held in some phases, on the GPU unless `on_host`."""
        if num_bytes > 0:
            entry = _Entry(
                kind=kind, num_bytes=int(num_bytes), on_host=self.on_cpu or on_host, phases=phases
            )
            self.entries.append(entry)

    def place(self, *, on_host: bool) -> PlaceMemory:
        """Return the memory on the GPU, or in host memory."""
        here = [entry for entry in self.entries if entry.on_host == on_host]
        return PlaceMemory(
            bytes_by_kind={
                kind: num_bytes
                for kind in KINDS
                if (num_bytes := _peak([entry for entry in here if entry.kind == kind]))
            },
            peak=_peak(here),
            training_peak=_peak(here, _PHASES[:-1]),
            certain_peak=_peak([entry for entry in here if entry.kind not in ESTIMATED]),
        )


def _peak(entries: Sequence[_Entry], phases: Sequence[Phase] = _PHASES) -> int:
    return max(
        sum(entry.num_bytes for entry in entries if phase in entry.phases) for phase in phases
    )


def rank_memory(model: ModelMemory, layout: MemoryLayout) -> RankMemory:
    """Return the memory of a rank that trains a model.

    Args:
        model: The sizes of the model.
        layout: The strategy and the other settings.
    """
    ledger = _Ledger(model, layout)
    strategy = STRATEGIES[layout.strategy]
    if strategy.uses_fsdp:
        _add_fsdp(ledger)
    elif strategy.zero_stage == 3:
        _add_zero3(ledger)
    elif strategy.zero_stage:
        _add_zero1_or_2(ledger, stage=strategy.zero_stage)
    else:
        _add_unsharded(ledger)
    ledger.add("weights", model.buffer_bytes)
    ledger.add("optimizer state", ledger.fixed_bytes, on_host=layout.offload)
    if layout.averages:
        _add_averages(ledger)
    activations = model.checkpointed if layout.activation_checkpointing else model.activations
    if activations is not None:
        ledger.add("activations", activations.of(layout.micro_batch_size), ("forward",))
        ledger.add("weights cast by autocast", _cast_bytes(ledger, activations), ("forward",))
    batch_bytes = layout.micro_batch_size * model.sample_bytes
    ledger.add("batches", layout.prefetched_batches * batch_bytes, on_host=True)
    return RankMemory(
        layout=layout, device=ledger.place(on_host=False), host=ledger.place(on_host=True)
    )


def _add_averages(ledger: _Ledger) -> None:
    """Add the averages of the trained weights, in fp32 or more, sharded as their updates are."""
    layout, strategy = ledger.layout, STRATEGIES[ledger.layout.strategy]
    sizes = [(item, max(item.num_bytes, 4 * item.values)) for item in ledger.trained]
    if strategy.uses_fsdp:
        own = saved = sum(_shard(item, num_bytes, ledger.ranks) for item, num_bytes in sizes)
    elif strategy.zero_stage:
        own = saved = sum(ceil_div(num_bytes, ledger.ranks) for _, num_bytes in sizes)
    else:
        own = sum(num_bytes for _, num_bytes in sizes)
        saved = own // layout.data_ranks
    ledger.add("averaged weights", own, on_host=layout.offload)
    ledger.add("checkpoint snapshot", saved, ("save",), on_host=True)


def _cast_bytes(ledger: _Ledger, activations: ActivationMemory) -> int:
    """Return the bytes of the copies of weights that autocast keeps until backward.

    FSDP gathers weights in half precision. ZeRO 3 replaces linear layers by functions that keep the
    weight itself for backward (deepspeed/runtime/zero/linear.py), so one copy exists at a time.
    """
    strategy = STRATEGIES[ledger.layout.strategy]
    if strategy.gathers_parameters_in_autocast_dtype:
        return 0
    if strategy.zero_stage == 3:
        largest = max((item.values for item in ledger.parameters), default=0)
        return min(activations.cast_bytes, 2 * largest)
    return activations.cast_bytes


def _add_unsharded(ledger: _Ledger) -> None:
    """Add what ddp keeps: everything on every rank.

    Gradients under DistributedDataParallel are views of its buckets, which are never freed. Each
    rank copies its part of a checkpoint.
    """
    layout = ledger.layout
    weights = sum(item.num_bytes for item in ledger.parameters)
    gradients = sum(item.gradient_bytes for item in ledger.trained)
    ledger.add("weights", weights)
    ledger.add("optimizer state", ledger.state_bytes)
    ledger.add("gradients", gradients, ledger.gradient_phases if layout.is_local else _PHASES)
    saved = (weights + ledger.state_bytes) / layout.data_ranks
    ledger.add("checkpoint snapshot", saved, ("save",), on_host=True)
    distribution = layout.distribution
    if distribution is None:
        return
    ledger.add("sums of the tree", (distribution.most_copies() - 1) * gradients, _PASSES)
    if layout.is_local:
        return
    # `launcher.engine.backends.exact_ddp`: each rank receives the sums over all nodes of the tree
    # for its slice of the buckets, and repeats its slice of the result for every rank.
    num_nodes = [len(distribution.nodes_of_rank(rank)) for rank in range(distribution.world_size)]
    received = gradients * sum(num_nodes) / distribution.world_size
    sent = 2 * max(num_nodes) * gradients if max(num_nodes) > 1 else 0
    ledger.add("buffers of communication", gradients + received + sent)


def _add_fsdp(ledger: _Ledger) -> None:
    """Add what fsdp keeps: shards, and the gathered weights of some blocks.

    The weights outside of blocks, the root, stay gathered from forward to the end of backward. A
    reduce-scatter has the gradients of a block as its input, in fp32, beside those that backward
    computes. At least two blocks are gathered at a time: the one in use, and the next one.
    """
    layout, ranks, settings = ledger.layout, ledger.ranks, ledger.layout.fsdp
    offload = layout.offload
    weights = sum(_shard(item, item.num_bytes, ranks) for item in ledger.parameters)
    states = sum(_shard(item, item.state_bytes, ranks) for item in ledger.trained)
    gradients = sum(_shard(item, item.gradient_bytes, ranks) for item in ledger.trained)
    ledger.add("weights", weights, on_host=offload)
    ledger.add("optimizer state", states, on_host=offload)
    ledger.add("gradients", gradients, ledger.gradient_phases, on_host=offload)
    if layout.accumulates and settings.accumulate_unsharded:
        whole = settings.reduce_bytes * sum(item.values for item in ledger.trained)
        ledger.add("gradients", whole, _PASSES)
    elif layout.accumulates and settings.copies > 1:
        ledger.add("gradients", gradients, _PASSES)  # until the groups of ranks add theirs
    ledger.add("checkpoint snapshot", weights + states, ("save",), on_host=True)
    root = _Gathered.of(ledger, None)
    blocks = {item.block for item in ledger.parameters if item.block is not None}
    gathered = [_Gathered.of(ledger, block) for block in blocks]
    largest = max(gathered, default=_Gathered(), key=sum)
    num_gathered = min(1 + max(settings.prefetch_blocks, 1), max(len(blocks), 2))
    in_use = root.weights + num_gathered * largest.weights
    if not settings.reshard_after_forward:
        in_use = root.weights + largest.weights + sum(block.weights for block in gathered)
    # At the end, the root's gradients are reduced while its weights are no longer gathered. gloo
    # copies the input of a reduce-scatter.
    last = largest.reduced + root.reduced
    last += root.reduced if ledger.on_cpu else root.gradients
    reducing = max(
        root.gradients + largest.gradients + largest.reduced,
        last - in_use,
        root.weights - 2 * largest.weights,  # copied out of the buffer of the all-gather
    )
    ledger.add("gathered weights", in_use, _PASSES)
    ledger.add("buffers of communication", reducing, _PASSES)
    if layout.distribution is not None:
        copies = layout.distribution.most_copies() - 1
        ledger.add("sums of the tree", copies * gradients, _PASSES)
        received = max(root.reduced, largest.reduced)
        ledger.add("buffers of communication", received, _PASSES)


class _Gathered(NamedTuple):
    """Bytes of a block of FSDP that is gathered."""

    weights: int = 0
    gradients: int = 0
    reduced: int = 0
    """Bytes of the gradients that a reduce-scatter takes."""

    @classmethod
    def of(cls, ledger: _Ledger, block: int | None) -> _Gathered:
        """Return the bytes of a block; None is what is in none."""
        half, ranks = ledger.layout.precision in _HALF_PRECISIONS, ledger.ranks
        reduce_bytes = ledger.layout.fsdp.reduce_bytes

        def padded(item: ParameterMemory, num_bytes: int) -> int:
            return _shard(item, num_bytes, ranks) * ranks

        items = [item for item in ledger.parameters if item.block == block]
        trained = [item for item in items if item.is_trained]
        return cls(
            sum(padded(item, 2 * item.values if half else item.num_bytes) for item in items),
            sum(2 * item.values if half else item.gradient_bytes for item in trained),
            sum(padded(item, max(reduce_bytes * item.values, _doubles(item))) for item in trained),
        )


def _doubles(item: ParameterMemory) -> int:
    """Return the bytes of a gradient in fp64, which is not rounded to be reduced; 0 for others."""
    return item.gradient_bytes if item.gradient_bytes > GRADIENT_BYTES * item.values else 0


def _add_zero1_or_2(ledger: _Ledger, *, stage: int) -> None:
    """Add what zero1 and zero2 keep: whole weights, and a part of them in fp32 that is updated.

    Gradients are copied into a bucket, and the bucket is copied once more to be reduced
    (deepspeed/runtime/zero/stage_1_and_2.py). On a GPU there are two buckets, so that one fills
    while the other is reduced.
    """
    layout, ranks, offload = ledger.layout, ledger.ranks, ledger.layout.offload
    part = ceil_div(sum(item.values for item in ledger.trained), ranks) * GRADIENT_BYTES
    weights = sum(item.num_bytes for item in ledger.parameters)
    trained_bytes = sum(item.gradient_bytes for item in ledger.trained)
    states = ledger.state_bytes / ranks
    ledger.add("weights", weights)
    ledger.add("fp32 copies", part, on_host=offload)
    ledger.add("optimizer state", states, on_host=offload)
    ledger.add("checkpoint snapshot", part + states, ("save",), on_host=True)
    bucket, is_full = _bucket(ledger)
    reducing: tuple[Phase, ...] = _PASSES if is_full else ("backward",)
    if ledger.on_cpu:
        ledger.add("buffers of communication", bucket, reducing)
    else:
        ledger.add("buffers of communication", 2 * bucket, _PASSES)
    ledger.add("buffers of communication", bucket, reducing)
    if stage == 1 and layout.accumulates:
        ledger.add("gradients", trained_bytes, _PASSES)
    if offload:
        # The gradients of the part, and its weights on their way to the GPU.
        ledger.add("gradients", part * (2 if layout.accumulates else 1), on_host=True)
        ledger.add("fp32 copies", part, on_host=True)
        largest = max(item.values for item in ledger.trained) * GRADIENT_BYTES
        ledger.add("buffers of communication", largest)
        ledger.add("buffers of communication", largest, on_host=True)
        return
    if stage == 2 and layout.accumulates:
        ledger.add("gradients", part, ("forward",))
    # The gradients of the part, in pieces and then in one piece.
    ledger.add("gradients", 2 * part, ("update",))
    if is_full:
        ledger.add("gradients", part, ("backward",))


def _add_zero3(ledger: _Ledger) -> None:
    """Add what zero3 keeps: shards, and whole weights that are used soon.

    A model of up to half of DeepSpeed's stage3_max_reuse_distance stays gathered from forward to
    backward. Gradients are copied into a bucket that is kept, and once more to be reduced
    (deepspeed/runtime/zero/stage3.py, partitioned_param_coordinator.py).
    """
    ranks, offload = ledger.ranks, ledger.layout.offload
    values = sum(item.values for item in ledger.parameters)
    weights = sum(ceil_div(item.num_bytes, ranks) for item in ledger.parameters)
    part = sum(ceil_div(item.values, ranks) for item in ledger.trained) * GRADIENT_BYTES
    states = ledger.state_bytes / ranks
    ledger.add("weights", weights, on_host=offload)
    ledger.add("optimizer state", states, on_host=offload)
    ledger.add("gradients", part, on_host=offload)
    ledger.add("checkpoint snapshot", weights + states, ("save",), on_host=True)
    if offload:
        ledger.add("fp32 copies", part, on_host=True)
        ledger.add("gradients", part, on_host=True)
    else:
        ledger.add("gradients", part, ("update",))  # copied into one piece
    bytes_per_value = max((item.num_bytes / item.values for item in ledger.parameters), default=4)
    largest = max((item.values for item in ledger.parameters), default=0)
    kept = sum(i.num_bytes for i in ledger.parameters if i.values <= _ZERO3_PERSISTENT_VALUES)
    reused = _ZERO3_REUSE_VALUES // 2 + _ZERO3_PREFETCH_VALUES + largest
    in_use = min(values, reused) * bytes_per_value
    ledger.add("gathered weights", in_use, ("forward",))
    ledger.add("gathered weights", kept, ("backward", "update", "save"))
    bucket, is_full = _bucket(ledger)
    ledger.add("buffers of communication", bucket)
    reducing: tuple[Phase, ...] = _PASSES if is_full else ("backward",)
    # gloo copies the input of a reduce-scatter and the output of an all-gather.
    ledger.add("buffers of communication", bucket * (2 if ledger.on_cpu else 1), reducing)
    if ledger.on_cpu:
        prefetched = min(values, max(_ZERO3_PREFETCH_VALUES, largest))
        ledger.add("buffers of communication", prefetched * bytes_per_value, ("forward",))


def _bucket(ledger: _Ledger) -> tuple[int, bool]:
    """Return the bytes of DeepSpeed's bucket of gradients, and whether it is filled several times.

    DeepSpeed allocates it whole, and a backward pass fills it at least once.
    """
    values = sum(item.values for item in ledger.trained)
    bucket = reduce_bucket_size(values)
    return bucket * GRADIENT_BYTES, values > bucket


def _shard(item: ParameterMemory, num_bytes: int, ranks: int) -> int:
    """Return the bytes of the largest shard of a tensor that FSDP cuts along its rows."""
    return ceil_div(item.rows, ranks) * ceil_div(num_bytes, item.rows) if item.rows else 0


def fitting(
    memories: Sequence[RankMemory], *, device_bytes: int | None, host_bytes: int | None
) -> list[RankMemory]:
    """Return those of several layouts that fit, in their order.

    Args:
        memories: The memory of a rank in each layout.
        device_bytes: Memory of the device, or of a CPU rank; None is unlimited.
        host_bytes: Host memory of a node; None is unlimited.
    """
    return [
        memory
        for memory in memories
        if (device_bytes is None or memory.place.peak <= device_bytes)
        and (host_bytes is None or memory.node_host_bytes <= host_bytes)
    ]
