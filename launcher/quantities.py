"""Quantities with units, as text for people."""

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
