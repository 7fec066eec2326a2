"""The cheapest strategy that fits into a memory limit, by what ranks send and compute again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.planning.memory_facts import GRADIENT_BYTES, MemoryLayout, ModelMemory
from launcher.planning.strategy import STRATEGIES


@dataclass(frozen=True, kw_only=True)
class StrategyCandidate:
    """A combination of settings that decides how much memory a rank needs."""

    strategy: str

    shard: str | int | None = None
    """`Recipe.shard` where there are several ways to shard; None elsewhere."""

    offload: bool
    activation_checkpointing: bool

    micro_batch_size: int
    """The largest micro-batch that fits, or the smallest if none does."""

    accumulation_steps: int
    """Micro-steps per step, with this micro-batch."""

    planned_bytes: int
    """Planned memory of a rank, on its GPU or, for CPU ranks, on the host."""

    planned_training_bytes: int
    """The same without the copies of a checkpoint, which a trial does not save."""

    planned_host_bytes: int
    """Planned host memory of all ranks of a node."""

    sent_bytes: int
    """Bytes that a rank sends to other ranks in a step."""

    fits: bool
    """Whether the planned memory is within the limits."""

    @property
    def title(self) -> str:
        """Return the settings as they are written."""
        texts = [f"strategy={self.strategy}"]
        texts += [] if self.shard is None else [f"shard={self.shard}"]
        texts += ["offload=cpu"] if self.offload else []
        texts += ["activation_checkpointing=true"] if self.activation_checkpointing else []
        return " ".join([*texts, f"micro_batch_size={self.micro_batch_size}"])


@dataclass(frozen=True, kw_only=True)
class StrategyTrial:
    """The outcome of a short training with the settings of a candidate."""

    candidate: StrategyCandidate

    fits: bool
    """Whether it needed no more memory than the limit."""

    peak_bytes: int | None = None
    """Measured memory of the rank that used most; None if memory ran out."""

    start_peak_bytes: int | None = None
    """The same from the call of the model function to the end of the first step."""

    samples_per_second: float | None = None
    """Throughput of all ranks together; None if memory ran out."""


def sent_bytes(model: ModelMemory, layout: MemoryLayout, accumulation_steps: int) -> int:
    """Return the bytes that a rank sends in one step.

    In a ring, a reduce-scatter or an all-gather of n bytes over W ranks makes each rank send
    (W - 1) / W n bytes, and an all-reduce twice as many. DDP all-reduces the gradients once. ZeRO 1
    reduces them once and ZeRO 2 in each micro-step, and both gather the weights once. ZeRO 3 and
    FSDP gather them for each forward and each backward, and reduce after each backward (Rajbhandari
    et al., arXiv:1910.02054, section 7).

    Args:
        model: The sizes of the model.
        layout: The strategy and the other settings.
        accumulation_steps: Micro-steps per step.
    """
    strategy = STRATEGIES[layout.strategy]
    ranks = layout.ranks if strategy.shards else layout.data_ranks
    items = [item.part() for item in model.parameters]
    values = sum(item.values for item in items)
    gradients = sum(item.values for item in items if item.is_trained) * GRADIENT_BYTES
    if not strategy.shards:
        moved = 2 * gradients
    elif not strategy.shards_parameters:
        reductions = accumulation_steps if strategy.shards_gradients else 1
        moved = reductions * gradients + gradients
    else:
        half = strategy.gathers_parameters_in_autocast_dtype and layout.precision in (
            "bf16",
            "fp16",
        )
        weights = 2 * values if half else sum(item.num_bytes for item in items)
        moved = accumulation_steps * (2 * weights + gradients)
    sent = moved * (ranks - 1) // ranks
    if strategy.uses_fsdp and (copies := layout.fsdp.copies) > 1:
        sent += 2 * gradients // ranks * (copies - 1) // copies  # the copies add their shards
    return sent


def cheapest_first(candidates: Sequence[StrategyCandidate]) -> list[StrategyCandidate]:
    """Return those candidates that fit, the cheapest first.

    Offloading comes last, because it moves weights or gradients over the bus in every step and
    updates them on the CPU. Checkpointing computes forward again, about a third more work. The
    rest is ordered by what ranks send, part of which overlaps with computation, and then by the
    number of micro-steps.
    """
    return sorted(
        (candidate for candidate in candidates if candidate.fits),
        key=lambda candidate: (
            candidate.offload,
            candidate.activation_checkpointing,
            candidate.sent_bytes,
            candidate.accumulation_steps,
        ),
    )


def fastest(trials: Sequence[StrategyTrial]) -> StrategyTrial | None:
    """Return the fastest trial that fits; None if none does."""
    fitting = [trial for trial in trials if trial.fits and trial.samples_per_second is not None]
    return max(fitting, key=lambda trial: trial.samples_per_second or 0.0, default=None)
