"""Arguments and options that several commands share."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from launcher.cli.completing import complete_recipes, complete_runs, complete_settings
from launcher.errors import UsageError
from launcher.recipe.text_values import digits

if TYPE_CHECKING:
    from launcher.recipe.overrides import Override
    from launcher.runs.job import OutputMode

Function = Callable[..., Any]

MAX_NODES = 1_000_000
"""Nodes, or ranks on a node, that an option takes at most."""

MAX_RESTARTS = 1_000_000
"""Restarts after a failure that an option takes at most."""

MIN_NODE_TIMEOUT = 4
"""Shortest time in seconds in which the kernel notices that a connection is lost."""

MAX_MEGABYTES = 1_000_000_000
"""Megabytes that an option takes at most."""

HEALTH_LEVELS = ("off", "quick", "full")
"""How thoroughly `--health` examines a node."""

_MAX_BYTES = 2**63

ACCEPTABLE = {
    "data": "the training data differs from that of the checkpoint",
    "missing-state": "the checkpoint lacks optimizer or module state, which then starts empty",
}
"""Differences from the checkpoint that a user can accept, and what each means."""


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


def recipe_argument(function: Function) -> Function:
    """Add the argument RECIPE, a name or a file."""
    return click.argument("recipe", shell_complete=complete_recipes)(function)


def overrides_argument(function: Function) -> Function:
    """Add the arguments NAME=VALUE."""
    return click.argument(
        "overrides", nargs=-1, metavar="[NAME=VALUE]...", shell_complete=complete_settings
    )(function)


def config_option(function: Function) -> Function:
    """Add the option --config."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE.yaml",
        help="YAML file of settings; NAME=VALUE arguments take precedence.",
    )(function)


def nproc_option(function: Function) -> Function:
    """Add the option --nproc-per-node."""
    return click.option(
        "-n",
        "--nproc-per-node",
        type=Count(min=1, largest=MAX_NODES),
        metavar="N",
        help="Ranks on each node. Default: one per GPU, or 2 CPU ranks without a GPU.",
    )(function)


def node_count_option(function: Function) -> Function:
    """Add the option --nodes of commands that plan for several nodes and start none."""
    return click.option(
        "--nodes",
        type=Count(min=1, largest=MAX_NODES),
        default=1,
        metavar="M",
        help="Number of nodes.",
    )(function)


def weights_options(function: Function) -> Function:
    """Add the argument RUN, and the options of commands that compute with its weights."""
    run = click.argument("run_dir", metavar="RUN", type=Folder(), shell_complete=complete_runs)
    checkpoint = click.option(
        "--checkpoint",
        metavar="best|last|STEP",
        help="Take the weights of this checkpoint. Default: the final weights or, while the run "
        "has none, the newest checkpoint.",
    )
    ranks = click.option(
        "-n",
        "--nproc-per-node",
        type=Count(min=1, largest=MAX_NODES),
        metavar="N",
        help="Ranks. Default: as many on each node as the run had.",
    )
    return run(checkpoint(ranks(function)))


def out_option(function: Function) -> Function:
    """Add the option --out."""
    return click.option(
        "--out",
        type=Folder(),
        metavar="DIR",
        help="Run folder to make. Default: runs/<recipe>-<time>.",
    )(function)


def mirror_options(function: Function) -> Function:
    """Add the options --mirror and --mirror-timeout."""
    mirror = click.option(
        "--mirror",
        type=URL(),
        metavar="URL",
        help="Keep the run in an object store as well: upload its checkpoints and records to URL, "
        "such as s3://bucket/runs/mine.",
    )
    timeout = click.option(
        "--mirror-timeout",
        type=Number(min=0, largest=1e9),
        default=300.0,
        show_default=True,
        metavar="SECONDS",
        help="How long the end of the run waits while uploads only fail.",
    )
    return mirror(timeout(function))


def accept_option(function: Function) -> Function:
    """Add the option --accept."""
    return click.option(
        "--accept",
        type=click.Choice(tuple(ACCEPTABLE)),
        multiple=True,
        help="Resume even if "
        + "; or if ".join(f"{meaning} ({name})" for name, meaning in ACCEPTABLE.items())
        + ".",
    )(function)


def code_change_option(function: Function) -> Function:
    """Add the option --allow-code-change."""
    return click.option(
        "--allow-code-change",
        is_flag=True,
        help="Resume with the project's present code, even if it is not that of the run so far.",
    )(function)


def freezing_options(function: Function) -> Function:
    """Add the options for the copy of the project that jobs, and runs on several nodes, import."""
    freezes = click.option(
        "--freeze/--no-freeze",
        "freezes",
        default=True,
        help="Copy the project into the run folder and import the copy, or import the project "
        "itself. Default: a copy for jobs and for runs on several nodes.",
    )
    limit = click.option(
        "--code-limit",
        type=Count(min=1, largest=MAX_MEGABYTES),
        metavar="MB",
        help="Largest size of that copy. Default: 100.",
    )
    return freezes(limit(function))


def health_option(function: Function) -> Function:
    """Add the option --health."""
    return click.option(
        "--health",
        type=click.Choice(HEALTH_LEVELS),
        default="off",
        show_default=True,
        help="Examine each node before its ranks start: the node alone (quick), or also with ranks "
        "that test its devices (full).",
    )(function)


def output_options(function: Function) -> Function:
    """Add the options --quiet and --json."""
    quiet = click.option(
        "-q", "--quiet", is_flag=True, help="Print errors only; everything else goes to the logs."
    )
    as_json = click.option(
        "--json", "as_json", is_flag=True, help="Print one line of JSON per event."
    )
    return quiet(as_json(function))


def output_mode(*, quiet: bool, as_json: bool) -> OutputMode:
    """Return the output mode that the options --quiet and --json ask for.

    Raises:
        UsageError: Both are given.
    """
    if quiet and as_json:
        raise UsageError("--quiet and --json exclude each other: keep one.")
    return "quiet" if quiet else "json" if as_json else "progress"


def read_overrides(config: Path | None, arguments: tuple[str, ...]) -> tuple[Override, ...]:
    """Return the overrides from a YAML file, then those from the command line."""
    from launcher.recipe.overrides import read_arguments, read_yaml

    return (*(read_yaml(config) if config else ()), *read_arguments(arguments))
