"""Quantities, as text for people."""

from __future__ import annotations

import math

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def duration(seconds: float | None) -> str:
    """Return a time span in at most two units, such as `3 min 20 s`; `?` if it is unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    whole_seconds = round(seconds)
    if whole_seconds < 60:
        return f"{whole_seconds} s"
    if whole_seconds < 3600:
        return f"{whole_seconds // 60} min {whole_seconds % 60} s"
    return f"{whole_seconds // 3600} h {whole_seconds % 3600 // 60} min"


def size(num_bytes: float) -> str:
    """Return a number of bytes with three digits and a unit, such as `62.8 GiB`."""
    power = 0
    while abs(num_bytes) >= 999.5 and power < len(_UNITS) - 1:
        num_bytes /= 1024
        power += 1
    return f"{num_bytes:.3g} {_UNITS[power]}"


def measured(value: float) -> str:
    """Return a loss or a metric as text: with four decimals, such as `0.0351`.

    Four significant digits stand for a number that four decimals would show as 0 or with at most
    one digit that is not 0, such as `3.512e-05`, and for one of a million or more.
    """
    if value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4f}"
    return f"{value:.4g}"
