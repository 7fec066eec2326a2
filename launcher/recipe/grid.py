"""Grids of settings: text such as lr=0.1,0.2 and seed=1,2, and all combinations of such values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from launcher.errors import UsageError
from launcher.recipe.validation import brief

_OPENING, _CLOSING = "([{", ")]}"

Value = TypeVar("Value")


def read_axes(arguments: Sequence[str], *, option: str = "") -> dict[str, tuple[str, ...]]:
    """Return the values of each setting that arguments such as lr=0.1,0.2 list, as text.

    A comma within brackets belongs to a value.

    Args:
        arguments: The arguments of the command line.
        option: The option that takes them, which errors name; empty if they follow the command.

    Raises:
        UsageError: An argument has another form, lists an empty value, or repeats a name.
    """
    axes: dict[str, tuple[str, ...]] = {}
    prefix = f"{option} " if option else ""
    for argument in arguments:
        name, equals, values = argument.partition("=")
        if not (name and equals and values):
            raise UsageError(
                f"{prefix}{brief(argument)}: expected name=value,value, such as lr=0.1,0.2."
            )
        choices = _split(values)
        if not all(choices):
            raise UsageError(
                f"{prefix}{brief(argument)}: one of the values between the commas is empty. Give "
                f"{name}=value,value without a comma at either end."
            )
        if name in axes:
            raise UsageError(
                f"{prefix}{brief(argument)}: {brief(name)} is given twice. List all of its values "
                f"in one argument, {brief(name)}=value,value."
            )
        axes[name] = choices
    return axes


def combinations_of(
    axes: Mapping[str, Sequence[Value]],
) -> tuple[tuple[tuple[str, Value], ...], ...]:
    """Return all combinations of the values of several settings; the last one changes fastest.

    Args:
        axes: The values of each setting, by its name.
    """
    pairs = [[(name, value) for value in values] for name, values in axes.items()]
    return tuple(itertools.product(*pairs))


def count_combinations(axes: Mapping[str, Sequence[Any]]) -> int:
    """Return the number of combinations of the values of several settings."""
    return math.prod(map(len, axes.values()))


def _split(values: str) -> tuple[str, ...]:
    """Return the pieces between the commas that are outside of brackets."""
    pieces, depth = [""], 0
    for letter in values:
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return tuple(piece.strip() for piece in pieces)
