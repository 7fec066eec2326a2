"""The search for the largest micro-batch that fits into memory, and for the fastest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.analysis.gradient_noise import MAX_BATCH_RATIO, items_ratio
from launcher.planning.global_batch import ceil_div

MEMORY_MARGIN = 0.1
"""Fraction of the memory that stays free, for fragmentation and for batches of unusual size."""

_FAST_ENOUGH = 0.97
"""Fraction of the best throughput that counts as equal to it; the smaller size saves memory."""

_WORTH_CHANGING = 0.9
"""Another global batch is chosen only if it takes at most this fraction of the time."""


@dataclass(frozen=True, kw_only=True)
class SizeTrial:
    """The outcome of one trial of a micro-batch size."""

    size: int
    """Samples in the micro-batch of each rank."""

    fits: bool
    """Whether the micro-batch fits into the memory of every rank."""

    samples_per_second: float | None = None
    """Throughput of all ranks together; None if the micro-batch does not fit."""

    peak_bytes: int | None = None
    """Peak memory of the rank that uses most; None if the micro-batch does not fit."""

    num_trained: int | None = None
    """Number of trained weights in the model; None if the micro-batch does not fit."""


def next_size(
    trials: Sequence[SizeTrial], share: int, *, first: int | None = None, resolution: float = 0.125
) -> int | None:
    """Return the micro-batch size to try next, or None once the largest that fits is known.

    Sizes double until one does not fit, or shrink to a quarter until one fits. The gap between
    the largest that fits and the smallest that does not is then bisected until it is at most
    `resolution` of the former. Only sizes that a plan can use are tried: ceil(share / n) for a
    whole number n of micro-batches.

    Args:
        trials: Outcomes of the trials so far.
        share: Samples of a rank in one global batch, the largest possible micro-batch.
        first: Size of the first trial; None starts at an eighth of the share.
        resolution: Relative precision of the result.
    """
    fitting = max((trial.size for trial in trials if trial.fits), default=0)
    failing = min((trial.size for trial in trials if not trial.fits), default=None)
    if failing is None:
        if fitting >= share:
            return None
        if not fitting:
            return ceil_div(share, 8 if first is None else ceil_div(share, first))
        doubled = min(2 * fitting, share)
        size = ceil_div(share, ceil_div(share, doubled))
        return size if size > fitting else ceil_div(share, ceil_div(share, fitting) - 1)
    if not fitting:
        return None if failing == 1 else ceil_div(share, ceil_div(share, max(failing // 4, 1)))
    if failing - fitting <= max(1, int(fitting * resolution)):
        return None
    fewest, most = ceil_div(share, failing), ceil_div(share, fitting)
    return ceil_div(share, (fewest + most) // 2) if most - fewest > 1 else None


def fastest_to_the_loss(
    trials: Sequence[SizeTrial], *, world_size: int, batch_size: int, critical: float
) -> SizeTrial:
    """Return the trial whose size, as the whole share of every rank, reaches a loss soonest.

    The number of samples to a given loss follows from B_crit (`items_ratio`); the time
    per sample is measured. Global batches above `MAX_BATCH_RATIO` times B_crit are
    excluded unless all are. `batch_size` is kept unless another batch saves a tenth of the time.

    Args:
        trials: Outcomes of the trials, at least one of which fits.
        world_size: Number of ranks.
        batch_size: The present global batch, in samples.
        critical: B_crit, in samples.
    """

    def relative_seconds(trial: SizeTrial) -> float:
        assert trial.samples_per_second is not None
        items = items_ratio(batch_size, trial.size * world_size, critical)
        return items / trial.samples_per_second

    fitting = [trial for trial in trials if trial.samples_per_second is not None]
    limit = MAX_BATCH_RATIO * critical
    allowed = [trial for trial in fitting if trial.size * world_size <= limit] or fitting
    present = [trial for trial in fitting if trial.size * world_size == batch_size]
    best_seconds = min(map(relative_seconds, allowed))
    if present and best_seconds > _WORTH_CHANGING * relative_seconds(present[0]):
        return present[0]
    fast = [trial for trial in allowed if best_seconds >= _FAST_ENOUGH * relative_seconds(trial)]
    return min(fast, key=lambda trial: trial.size)


def choose_size(trials: Sequence[SizeTrial]) -> SizeTrial | None:
    """Return the smallest size that is about as fast as the fastest, or None if nothing fits."""
    fitting = [trial for trial in trials if trial.samples_per_second is not None]
    if not fitting:
        return None
    best_rate = max(trial.samples_per_second or 0.0 for trial in fitting)
    fast = [
        trial for trial in fitting if (trial.samples_per_second or 0.0) >= _FAST_ENOUGH * best_rate
    ]
    return min(fast, key=lambda trial: trial.size)
