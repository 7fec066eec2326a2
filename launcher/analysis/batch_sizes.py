"""Which micro-batch fits into memory, and which is the fastest: a search over sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.analysis.gradient_noise import LARGEST, items_ratio
from launcher.planning.global_batch import ceil_div

MARGIN = 0.1
"""Part of the memory that is left free: fragments, and batches that are larger than others."""

_AS_FAST = 0.97
"""A size at this part of the best throughput is as fast: the smaller leaves memory free."""

_WORTH = 0.9
"""Another batch is taken for this part of the time or less."""


@dataclass(frozen=True, kw_only=True)
class SizeTrial:
    """What came of one size."""

    size: int
    """Samples that went through the model at once on each rank."""

    fits: bool
    samples_per_second: float | None = None
    """Of all ranks together; None where it does not fit."""

    peak_bytes: int | None = None
    """The most memory that a rank has used."""

    num_trained: int | None = None
    """Weights of the model that are trained."""


def next_size(
    trials: Sequence[SizeTrial], share: int, *, first: int | None = None, resolution: float = 0.125
) -> int | None:
    """Return the size to try next; None when it is known which is the largest that fits.

    Sizes double until one does not fit, or are quartered
    until one does; then the gap is halved until it is smaller than `resolution` of the size that
    fits. Only those are tried that a plan takes: a rank's share in equal micro-batches,
    ceil(share / number of them).

    Args:
        trials: Those so far.
        share: A rank's samples of a global batch: no micro-batch is larger.
        first: The size to begin with; None is an eighth of the share.
        resolution: How exactly the largest is looked for, relative to it.
    """
    fitting = max((trial.size for trial in trials if trial.fits), default=0)
    failing = min((trial.size for trial in trials if not trial.fits), default=None)
    if failing is None:
        if fitting >= share:
            return None
        if not fitting:
            return ceil_div(share, 8 if first is None else ceil_div(share, first))
        wanted = min(2 * fitting, share)
        even = ceil_div(share, ceil_div(share, wanted))
        return even if even > fitting else ceil_div(share, ceil_div(share, fitting) - 1)
    if not fitting:
        return None if failing == 1 else ceil_div(share, ceil_div(share, max(failing // 4, 1)))
    if failing - fitting <= max(1, int(fitting * resolution)):
        return None
    few, many = ceil_div(share, failing), ceil_div(share, fitting)
    return ceil_div(share, (few + many) // 2) if many - few > 1 else None


def fastest_to_the_loss(
    trials: Sequence[SizeTrial], *, world_size: int, batch_size: int, noise_scale: float
) -> SizeTrial:
    """Return the trial whose size, on every rank, is the batch that gets to a loss the soonest.

    The samples that it takes follow from the noise scale (`items_ratio`), how long they take was
    measured. A larger batch than `LARGEST` times the noise scale is not taken, nor another one
    than `batch_size` for less than a tenth of the time.

    Args:
        trials: Of which one fits at least.
        world_size: Ranks.
        batch_size: The global batch to begin with.
        noise_scale: B_simple, in samples.
    """

    def seconds(trial: SizeTrial) -> float:
        assert trial.samples_per_second is not None
        items = items_ratio(batch_size, trial.size * world_size, noise_scale)
        return items / trial.samples_per_second

    fitting = [trial for trial in trials if trial.samples_per_second is not None]
    small = [trial for trial in fitting if trial.size * world_size <= LARGEST * noise_scale]
    present = [trial for trial in fitting if trial.size * world_size == batch_size]
    best = min(small or fitting, key=seconds)
    if present and seconds(best) > _WORTH * seconds(present[0]):
        return present[0]
    fast = [trial for trial in small or fitting if seconds(best) >= _AS_FAST * seconds(trial)]
    return min(fast, key=lambda trial: trial.size)


def choose(trials: Sequence[SizeTrial]) -> SizeTrial | None:
    """Return the trial to take: the smallest of those that are as fast as the fastest.

    None where nothing fits.
    """
    fitting = [trial for trial in trials if trial.samples_per_second is not None]
    if not fitting:
        return None
    best = max(trial.samples_per_second or 0.0 for trial in fitting)
    fast = [trial for trial in fitting if (trial.samples_per_second or 0.0) >= _AS_FAST * best]
    return min(fast, key=lambda trial: trial.size)
