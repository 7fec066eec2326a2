"""The setting `max_time`: the time in which a run is to finish its schedule."""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}

MaxTime = Annotated[
    str,
    Meta(
        pattern=r"^(?=.*[1-9])[0-9]{1,9}(\.[0-9]{1,9})?(s|min|h)\Z",
        description="a time such as 90s, 30min or 2h",
    ),
]
"""A time that is not zero, as a number with its unit."""


def seconds_in(max_time: str) -> float:
    """Return the seconds of a value of the setting, such as 1800.0 for 30min.

    Raises:
        ValueError: The text is not such a value.
    """
    match = re.fullmatch(r"([0-9.]{1,19})(s|min|h)", max_time)
    if match is None:
        raise ValueError(f"expected a time such as 30min, found {max_time!r}")
    return float(match[1]) * _SECONDS[match[2]]
