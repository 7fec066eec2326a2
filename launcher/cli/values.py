"""Types of the values that options take, beyond those of click."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

import click

from launcher.recipe.text_values import digits

MAX_NODES = 1_000_000
"""Nodes, or ranks on a node, that an option takes at most."""

_MAX_BYTES = 2**63


class Bytes(click.ParamType[int]):
    """A number of bytes with a unit, such as 2GiB, 512M or 1500MB."""

    name = "size"
    _units: ClassVar[dict[str, int]] = {
        "": 1,
        **{unit: 1 << 10 * power for power, unit in enumerate("KMGT", start=1)},
        **{f"{unit}IB": 1 << 10 * power for power, unit in enumerate("KMGT", start=1)},
        **{f"{unit}B": 1000**power for power, unit in enumerate("KMGT", start=1)},
    }

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        number = r"([0-9]{1,18}(?:\.[0-9]{1,18})?)"
        match = re.fullmatch(rf"{number}\s*([A-Z]*)", str(value).strip().upper())
        size = 0
        if match is not None and match[2] in self._units:
            size = int(float(match[1]) * self._units[match[2]])
        if not 0 < size < _MAX_BYTES:
            self.fail(f"{_shown(value)}: expected a size such as 2GiB or 512MiB.", param, ctx)
        return size


class Count(click.IntRange):
    """A whole number from `min` to `largest`; the help shows only `min`.

    Args:
        min: The smallest number.
        largest: The largest number, far above what makes sense.
    """

    def __init__(self, *, min: int, largest: int) -> None:  # noqa: A002  # as click calls it
        super().__init__(min=min)
        self._largest = largest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: int = super().convert(value, param, ctx)
        if number > self._largest:
            self.fail(f"{_shown(value)} is more than {self._largest:,}.", param, ctx)
        return number


class Number(click.FloatRange):
    """A finite number from `min`, or above it if `min_open`, to `largest`; the help shows `min`.

    Args:
        min: The smallest number.
        min_open: Whether `min` itself is too small.
        largest: The largest number, far above what makes sense.
    """

    def __init__(
        self,
        *,
        min: float,  # noqa: A002  # as click calls it
        min_open: bool = False,
        largest: float = sys.float_info.max,
    ) -> None:
        super().__init__(min=min, min_open=min_open)
        self._largest = largest

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{number} is not a number.", param, ctx)
        if number > self._largest:
            self.fail(f"{_shown(value)} is more than {self._largest:g}.", param, ctx)
        return number


class NodeRange(click.ParamType[tuple[int, int]]):
    """A number of nodes, or a range MIN:MAX."""

    name = "nodes"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, colon, second = str(value).partition(":")
        low = digits(first)
        high = digits(second) if colon else low
        if not (low and high and low <= high <= MAX_NODES):
            self.fail(
                f"{_shown(value)}: expected a number of nodes, or a range such as 2:4.",
                param,
                ctx,
            )
        return low, high


class Names(click.ParamType[tuple[str, ...]]):
    """Comma-separated names."""

    name = "names"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(","))
        if not all(names) or any(name.startswith("-") for name in names):
            self.fail(f"{_shown(value)}: expected comma-separated names.", param, ctx)
        return names


class Choices(Names):
    """Comma-separated names out of a fixed set."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self._choices = choices

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        names = super().convert(value, param, ctx)
        for name in names:
            if name not in self._choices:
                self.fail(f"{_shown(name)} is not one of {', '.join(self._choices)}.", param, ctx)
        return names


class Folder(click.Path):
    """A folder or file of this machine, which a URL is not."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from launcher.object_stores.locations import is_url

        if is_url(value):
            self.fail(
                f"{_shown(value)} is a URL, and this is a path on this machine. `launcher "
                "download` downloads a run from an object store.",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class FolderOrURL(click.Path):
    """A folder, or the URL of one in an object store."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from launcher.object_stores.locations import is_url

        return value if is_url(value) else super().convert(value, param, ctx)


class URL(click.ParamType[str]):
    """The URL of a folder in an object store."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from launcher.object_stores.locations import is_url

        if not is_url(value):
            self.fail(f"{_shown(value)}: expected a URL such as s3://bucket/runs/mine.", param, ctx)
        return str(value)


def _shown(value: object) -> str:
    from launcher.recipe.validation import brief

    return brief(repr(value))
