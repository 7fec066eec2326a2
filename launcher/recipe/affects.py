"""What a setting affects: the one classification behind every check of settings.

Each field of `Recipe` that is a setting carries an `Affects` in its annotation, such as
`lr: Annotated[PositiveFloat, Affects.UPDATES]`. From it follows which settings all ranks must
share, which ones a resumed run must keep, and which changes it reports.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_origin, get_type_hints


class Affects(enum.Enum):
    """The part of a run that a setting, or a number of a plan, affects.

    All ranks must share every value except those that affect `NODE`: ranks that disagree about a
    checkpoint or an evaluation would wait for each other forever.
    """

    SAMPLES = enum.auto()
    """Which samples each step takes. A resumed run must keep them."""

    UPDATES = enum.auto()
    """What a step does to the weights. A resumed run may change it, and reports the change."""

    EXECUTION = enum.auto()
    """Where and how steps are computed: their results differ by rounding alone."""

    NODE = enum.auto()
    """How the ranks of one node read samples and use its cores. Nodes may differ."""

    NOTHING = enum.auto()
    """Nothing about the training: what is measured and saved, and when a run gives up."""


@functools.cache
def effects_of(dataclass: type) -> Mapping[str, Affects]:
    """Return what the annotated fields of a dataclass affect, by name, in declared order."""
    effects = {}
    for name, hint in get_type_hints(dataclass, include_extras=True).items():
        for metadata in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
            if isinstance(metadata, Affects):
                effects[name] = metadata
    return MappingProxyType(effects)


def without_effect(hint: Any) -> Any:
    """Return a type hint without its `Affects`; limits such as `Meta(ge=1)` stay."""
    if get_origin(hint) is not Annotated:
        return hint
    bare, *metadata = get_args(hint)
    for item in metadata:
        if not isinstance(item, Affects):
            bare = Annotated[bare, item]
    return bare
