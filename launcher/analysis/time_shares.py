"""Where the time of a run's steps went, on which rank, and what it made of its device."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from launcher.analysis.device_peaks import peak_flops
from launcher.runs.history import History

_STRAGGLES = 1.15
"""A rank that takes so many times the median of the others is named."""

_MOST_NAMED = 8
_SMOOTH = 0.02
"""The part of the steps over which a smooth line forgets."""


def utilisation(history: History, flops: float) -> tuple[str, str]:
    """Return (what, value) of how much of its device a rank uses, as far as that is known."""
    name = next((e["device_name"] for e in reversed(history.events) if "device_name" in e), "")
    tf32 = bool(history.plan.settings.get("tf32"))
    peak = peak_flops(name, history.plan.precision, tf32=tf32)
    if peak is None:
        return "model operations of a rank", f"{_metric(flops)}FLOP/s"
    return "model FLOPs utilisation", f"{flops / peak:.1%} of {_metric(peak)}FLOP/s"


def step_parts(history: History) -> dict[str, list[float]]:
    """Return the seconds of each step by what they went to, means over ranks."""
    steps = history.steps
    whole, waits = steps["step_seconds"], list(steps["data_wait_seconds"])
    told = any(map(math.isfinite, steps["communication_seconds"]))
    talks = [c if math.isfinite(c) else 0.0 for c in steps["communication_seconds"]]
    rest = [max(t - w - c, 0.0) for t, w, c in zip(whole, waits, talks, strict=True)]
    name = "computing and the rest" if told else "computing, communication and the rest"
    parts = {"waiting for data": waits}
    if told and history.plan.world_size > 1:
        parts["waiting for communication"] = talks
    return parts | {name: rest}


def shares_in_words(history: History, parts: dict[str, list[float]]) -> str:
    """Return where the time of a typical step went, and how to learn more."""
    means = {}
    for name, values in parts.items():
        late = [value for value in values[len(values) // 10 :] if math.isfinite(value)]
        means[name] = statistics.fmean(late) if late else 0.0
    whole = sum(means.values())
    if not whole:
        return ""
    said = ", ".join(f"{value / whole:.0%} {name}" for name, value in means.items())
    words = f"A step took {1e3 * whole:.3g} ms on average: {said}."
    if "waiting for communication" not in parts and history.plan.world_size > 1:
        words += (
            f" What ranks wait for communication under {history.plan.strategy} is told by "
            "`launcher profile`."
        )
    if means["waiting for data"] > 0.1 * whole:
        words += " `launcher find loader` says how many workers would be enough."
    return words


def mean_own_seconds(history: History) -> list[float] | None:
    """Return each rank's own part of a step, on average; None where that is not known."""
    rows = [own for _, own in own_seconds(history)]
    rows = rows[1:] or rows  # the first steps are slow for reasons of their own
    return [statistics.fmean(column) for column in zip(*rows, strict=True)] if rows else None


def own_seconds(history: History) -> list[tuple[int, list[float]]]:
    """Return (step, own part by rank) since the run has had the ranks that it has now."""
    rows: list[tuple[int, list[float]]] = []
    for row in history.ranks:
        if row.own_seconds is not None:
            same = not rows or len(rows[0][1]) == len(row.own_seconds)
            rows = [*(rows if same else []), (row.step, row.own_seconds)]
    return rows


def stragglers_in_words(own: Sequence[float]) -> str:
    """Return which ranks the others wait for, if for any."""
    slow = stragglers(own)
    if not slow:
        return "No rank is much slower than the others."
    named = ", ".join(f"rank {rank} ({times:.3g}x)" for rank, times in slow[:_MOST_NAMED])
    more = f" and {len(slow) - _MOST_NAMED} more" if slow[_MOST_NAMED:] else ""
    return f"The others wait for {named}{more}: times what the median of them takes of a step."


def stragglers(own: Sequence[float]) -> list[tuple[int, float]]:
    """Return (rank, times the median of the others) of the ranks that others wait for."""
    middle = statistics.median(own) if len(own) > 1 else 0.0
    found = []
    for rank, value in enumerate(own):
        if value > middle > 0:
            others = statistics.median([*own[:rank], *own[rank + 1 :]])
            if value > _STRAGGLES * others > 0:
                found.append((rank, value / others))
    return sorted(found, key=lambda each: -each[1])


def smoothed(values: Sequence[float]) -> list[float]:
    """Return a running mean that forgets over a fiftieth of the values, and starts unbiased.

    Where a value is not finite there is a gap.
    """
    memory = max(len(values) * _SMOOTH, 1.0)
    weight = 1 - 1 / memory
    total = norm = 0.0
    out = []
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + value, weight * norm + 1
        out.append(total / norm if math.isfinite(value) else math.nan)
    return out


def _metric(value: float) -> str:
    """Return a number with its prefix: `1.23 G`."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"
