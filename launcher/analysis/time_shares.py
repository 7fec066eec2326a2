"""The time of a run's steps by part and by rank, and the utilisation of its devices."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from launcher.analysis.device_peaks import peak_flops
from launcher.runs.history import History, RankShares

_STRAGGLER_RATIO = 1.15
"""A rank whose own time exceeds this many times the median of the others is a straggler."""

_MAX_NAMED_RANKS = 8
_SMOOTHING_FRACTION = 0.02
"""Time constant of a smoothed line, as a fraction of its length."""

_LARGE_WAIT = 0.1
"""Fraction of a step from which waiting for data merits advice."""


def utilisation(history: History, flops: float) -> tuple[str, str]:
    """Return a label and a text for how much of its device a rank uses.

    If the peak of the device is known, the text is a fraction of it, otherwise a throughput.

    Args:
        history: The run.
        flops: Model floating-point operations per second of a rank.
    """
    tf32 = bool(history.plan.settings.get("tf32"))
    peak = peak_flops(history.device_name, history.plan.precision, tf32=tf32)
    if peak is None:
        return "model operations of a rank", f"{_with_prefix(flops)}FLOP/s"
    return "model FLOPs utilisation", f"{flops / peak:.1%} of {_with_prefix(peak)}FLOP/s"


def step_parts(history: History) -> dict[str, list[float]]:
    """Return the seconds of each step by part, averaged over ranks.

    Communication has a part of its own if the run has several ranks and measured it.
    """
    steps = history.steps
    step_seconds, data_waits = steps["step_seconds"], list(steps["data_wait_seconds"])
    is_measured = any(map(math.isfinite, steps["communication_seconds"]))
    communication = [
        seconds if math.isfinite(seconds) else 0.0 for seconds in steps["communication_seconds"]
    ]
    rest = [
        max(seconds - data_wait - communicating, 0.0)
        for seconds, data_wait, communicating in zip(
            step_seconds, data_waits, communication, strict=True
        )
    ]
    rest_name = "computing and the rest" if is_measured else "computing, communication and the rest"
    parts = {"waiting for data": data_waits}
    if is_measured and history.plan.world_size > 1:
        parts["waiting for communication"] = communication
    return parts | {rest_name: rest}


def shares_text(history: History, parts: dict[str, list[float]]) -> str:
    """Return the mean duration of a step and the shares of its parts, with what to run next.

    The first tenth of the steps is ignored as warm-up. The text is empty if nothing was timed.

    Args:
        history: The run.
        parts: Seconds of each step by part, from `step_parts`.
    """
    means = {}
    for name, values in parts.items():
        warm = values[len(values) // 10 :]
        finite = [value for value in warm if math.isfinite(value)]
        means[name] = statistics.fmean(finite) if finite else 0.0
    total = sum(means.values())
    if not total:
        return ""
    shares = ", ".join(f"{value / total:.0%} {name}" for name, value in means.items())
    sentences = [f"A step took {1e3 * total:.3g} ms on average: {shares}."]
    if "waiting for communication" not in parts and history.plan.world_size > 1:
        sentences.append(
            f"Under strategy={history.plan.strategy} `launcher profile` measures how long ranks "
            "wait for communication."
        )
    if means["waiting for data"] > _LARGE_WAIT * total:
        sentences.append("`launcher find loader` measures how many workers would be enough.")
    return " ".join(sentences)


def mean_own_seconds(history: History) -> list[float] | None:
    """Return the mean seconds per step of each rank's own work, or None if it was not measured."""
    return _means(own_seconds(history))


def mean_device_seconds(history: History) -> list[float] | None:
    """Return the mean seconds per step of each rank's own passes on its GPU, or None if unknown."""
    return _means(_seconds_by_rank(history, lambda row: row.device_seconds))


def own_seconds(history: History) -> list[tuple[int, list[float]]]:
    """Return (step, seconds of each rank's own work) since the run has its present world size.

    The list is empty if that was not measured, as under FSDP and ZeRO.
    """
    return _seconds_by_rank(history, lambda row: row.own_seconds)


def _means(rows: list[tuple[int, list[float]]]) -> list[float] | None:
    """Return the mean of each rank, or None without rows; the first one includes the warm-up."""
    columns = zip(*(seconds for _, seconds in rows[1:] or rows), strict=True)
    return [statistics.fmean(column) for column in columns] or None


def _seconds_by_rank(
    history: History, get: Callable[[RankShares], list[float] | None]
) -> list[tuple[int, list[float]]]:
    """Return (step, seconds of each rank) since the run has its present world size."""
    rows: list[tuple[int, list[float]]] = []
    world_size = 0
    for row in history.ranks:
        if len(row.memory_bytes) != world_size:
            rows, world_size = [], len(row.memory_bytes)
        if (seconds := get(row)) is not None:
            rows.append((row.step, seconds))
    return rows


def stragglers_text(
    rank_seconds: Sequence[float], device_seconds: Sequence[float] | None = None
) -> str:
    """Return a text that names the ranks that the others wait for, and whether GPUs are slow.

    Args:
        rank_seconds: Seconds per step of each rank's own work.
        device_seconds: Seconds per step of each rank's own passes on its GPU; None if unknown.
    """
    slow_ranks = stragglers(rank_seconds)
    slow_devices = stragglers(device_seconds or ())
    sentences = []
    if slow_ranks:
        sentences.append(
            f"The others wait for {_names(slow_ranks)}. The factor is a rank's own time per step "
            "over the median of the other ranks."
        )
    if slow_devices:
        sentences.append(
            f"Forward and backward passes take longer on the GPU of {_names(slow_devices)}: "
            "`launcher doctor` compares the speed and the health of GPUs."
        )
    elif slow_ranks and device_seconds:
        sentences.append(
            "Forward and backward passes take equally long on all GPUs, so the time is lost on the "
            "host: in reading data, or to other processes on its cores."
        )
    return " ".join(sentences) or "No rank is much slower than the others."


def _names(slow_ranks: Sequence[tuple[int, float]]) -> str:
    """Return ranks with their factors: `rank 3 (1.4x), rank 5 (1.2x) and 2 more`."""
    names = ", ".join(
        f"rank {rank} ({ratio:.3g}x)" for rank, ratio in slow_ranks[:_MAX_NAMED_RANKS]
    )
    num_unnamed = len(slow_ranks) - _MAX_NAMED_RANKS
    return names + (f" and {num_unnamed} more" if num_unnamed > 0 else "")


def stragglers(rank_seconds: Sequence[float]) -> list[tuple[int, float]]:
    """Return (rank, ratio to the median of the other ranks) of the stragglers, slowest first.

    Args:
        rank_seconds: Seconds per step of each rank's own work.
    """
    median = statistics.median(rank_seconds) if len(rank_seconds) > 1 else 0.0
    slow_ranks = []
    for rank, seconds in enumerate(rank_seconds):
        if seconds > median > 0:
            others = statistics.median([*rank_seconds[:rank], *rank_seconds[rank + 1 :]])
            if seconds > _STRAGGLER_RATIO * others > 0:
                slow_ranks.append((rank, seconds / others))
    return sorted(slow_ranks, key=lambda straggler: -straggler[1])


def smoothed(values: Sequence[float]) -> list[float]:
    """Return an unbiased exponential moving average over a fiftieth of the values.

    A value that is not finite becomes NaN in the result and does not enter the average.
    """
    memory = max(len(values) * _SMOOTHING_FRACTION, 1.0)
    decay = 1 - 1 / memory
    total = weight = 0.0
    averages = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        averages.append(total / weight if math.isfinite(value) else math.nan)
    return averages


def _with_prefix(value: float) -> str:
    """Return a number with three digits and its metric prefix, such as `1.23 G`."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"
