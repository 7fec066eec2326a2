"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from launcher.cli.completing import complete_recipes, complete_settings
from launcher.errors import UsageError

if TYPE_CHECKING:
    from launcher.recipe.overrides import Override
    from launcher.runs.job import OutputMode

Function = Callable[..., Any]

ACCEPTABLE = {
    "data": "the data is not that of the checkpoint (data)",
    "missing-state": "the checkpoint lacks state, which begins anew (missing-state)",
}
"""What the user can accept of the checkpoint that a run is resumed from, and what that means."""


class Bytes(click.ParamType[int]):
    """A number of bytes with its unit: 2GiB, 512M, 1500MB."""

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
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(value).strip().upper())
        if found is None or found[2] not in self._units or float(found[1]) == 0:
            self.fail(f"{value!r}: expected a size such as 2GiB or 512MiB.", param, ctx)
        return int(float(found[1]) * self._units[found[2]])


class Names(click.ParamType[tuple[str, ...]]):
    """Names with commas between them."""

    name = "names"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(piece.strip() for piece in str(value).split(","))
        if not all(names) or any(name.startswith("-") for name in names):
            self.fail(f"{value!r}: expected names with commas between them.", param, ctx)
        return names


def recipe_argument(function: Function) -> Function:
    """Take a recipe, by its name or its file."""
    return click.argument("recipe", shell_complete=complete_recipes)(function)


def overrides_argument(function: Function) -> Function:
    """Take `name=value` arguments."""
    return click.argument(
        "overrides", nargs=-1, metavar="[NAME=VALUE]...", shell_complete=complete_settings
    )(function)


def config_option(function: Function) -> Function:
    """Take a YAML file of values."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE.yaml",
        help="Take values from a YAML file; NAME=VALUE arguments are stronger.",
    )(function)


def nproc_option(function: Function) -> Function:
    """Take the number of ranks per node."""
    return click.option(
        "-n",
        "--nproc-per-node",
        type=click.IntRange(min=1),
        metavar="N",
        help="Ranks on each node. Default: one per GPU, or 2 CPU ranks where there is no GPU.",
    )(function)


def nodes_options(function: Function) -> Function:
    """Take the number of machines, and where they meet."""
    count = click.option(
        "--nodes",
        type=click.IntRange(min=1),
        metavar="M",
        help="Machines, on each of which this command is started. Default: as many as srun has.",
    )
    join_timeout = click.option(
        "--join-timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="How long they wait for each other. Default: 300, in Slurm's jobs 120.",
    )
    place = click.option(
        "--rendezvous",
        metavar="HOST[:PORT]",
        help="Where they meet: a name of the first of them. Slurm's jobs know.",
    )
    hosts = click.option(
        "--hosts",
        type=Names(),
        metavar="A,B...",
        help="Start it on these machines from here, through ssh; they meet on the first.",
    )
    ssh = click.option(
        "--ssh", metavar="COMMAND", help="How they are reached. Default: ssh, without questions."
    )
    return count(place(hosts(ssh(join_timeout(function)))))


def out_option(function: Function) -> Function:
    """Take the run folder to make."""
    return click.option(
        "--out",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="The run folder to make. Default: runs/<recipe>-<time>.",
    )(function)


def accept_option(function: Function) -> Function:
    """Take what a resumed run may have otherwise than its checkpoint."""
    return click.option(
        "--accept",
        type=click.Choice(tuple(ACCEPTABLE)),
        multiple=True,
        help=f"Go on although {'; or although '.join(ACCEPTABLE.values())}.",
    )(function)


def max_restarts_option(function: Function) -> Function:
    """Take how often a run that fails begins again."""
    return click.option(
        "--max-restarts",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="Start again from the newest checkpoint up to N times if a rank fails.",
    )(function)


def output_options(function: Function) -> Function:
    """Take what is printed of a run."""
    quiet = click.option(
        "-q", "--quiet", is_flag=True, help="Print nothing but errors; the logs have the rest."
    )
    as_json = click.option(
        "--json", "as_json", is_flag=True, help="Print JSON for programs, a line for each event."
    )
    return quiet(as_json(function))


def output_mode(*, quiet: bool, as_json: bool) -> OutputMode:
    """Return what is printed of a run.

    Raises:
        UsageError: Nothing and JSON at once.
    """
    if quiet and as_json:
        raise UsageError("--quiet prints nothing and --json prints lines: keep one.")
    return "quiet" if quiet else "json" if as_json else "progress"


def read_overrides(config: Path | None, arguments: tuple[str, ...]) -> tuple[Override, ...]:
    """Return the overrides of a YAML file and of the command line, the weaker ones first."""
    from launcher.recipe.overrides import read_arguments, read_yaml

    return (*(read_yaml(config) if config else ()), *read_arguments(arguments))


class SettingsCommand(click.Command):
    """A command whose help ends with the settings that NAME=VALUE can name."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from launcher.recipe.recipe import field_sentences, setting_types

        names = (*setting_types(), "schedule", "optimizer")
        sentences = field_sentences()
        with formatter.section("Settings (NAME=VALUE)"):
            formatter.write_dl([(name, sentences[name]) for name in names if name != "name"])
        super().format_epilog(ctx, formatter)
