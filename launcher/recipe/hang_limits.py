"""The setting `hang_timeout`: how long a run may make no progress in each of its phases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

from msgspec import Meta

Seconds = Annotated[float, Meta(gt=0, le=1e9)]
"""A time to wait, which the timers of Python can hold."""

HangPhase = Literal["start", "step", "evaluation", "save"]
"""The phases of a run that have limits of their own."""

HangTimeout = (
    Seconds
    | Annotated[
        Mapping[HangPhase, Seconds | None],
        Meta(
            description=(
                "limits for some of start, step, evaluation and save, such as step:120,save:900"
            )
        ),
    ]
    | None
)
"""A value of the setting: seconds for a step, seconds by phase, or None."""


@dataclass(frozen=True, kw_only=True)
class HangLimits:
    """Seconds without progress after which a run is ended as hung, by phase; None is no limit."""

    start: float | None = 1800.0
    """Up to the end of the first step: data and model are built, workers start, code is compiled.

    torch itself ends collective calls after the same time.
    """

    step: float | None = 180.0
    """In a later step, for each micro-batch."""

    evaluation: float | None = 600.0
    """In an evaluation, for each batch; the first one may be compiled."""

    save: float | None = 1800.0
    """While a checkpoint or the final weights are saved, for each of them."""

    def longest(self) -> float | None:
        """Return the longest limit; None if a phase has none."""
        limits = list(asdict(self).values())
        return None if None in limits else max(limits)

    def __str__(self) -> str:
        """Return the limits as text: `start 1,800 s, step 180 s, ...`."""
        if not any(asdict(self).values()):
            return "none, so a run that hangs waits until it is ended"
        return ", ".join(
            f"{name} {'without limit' if seconds is None else f'{seconds:,g} s'}"
            for name, seconds in asdict(self).items()
        )


def hang_limits(hang_timeout: float | Mapping[HangPhase, float | None] | None) -> HangLimits:
    """Return the limits that a value of the setting `hang_timeout` stands for.

    Args:
        hang_timeout: The limit of a step in seconds, or limits by phase; other phases have their
            defaults. None removes all limits.
    """
    if hang_timeout is None:
        return HangLimits(start=None, step=None, evaluation=None, save=None)
    if isinstance(hang_timeout, Mapping):
        return replace(HangLimits(), **{str(name): limit for name, limit in hang_timeout.items()})
    return HangLimits(step=hang_timeout)
