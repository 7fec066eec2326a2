"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.completing import complete_recipes, complete_runs, complete_settings
from launcher.cli.values import MAX_NODES, URL, Count, Folder, Number
from launcher.errors import UsageError

if TYPE_CHECKING:
    from launcher.recipe.overrides import Override
    from launcher.runs.job import OutputMode

Function = Callable[..., Any]

MAX_RESTARTS = 1_000_000
"""Restarts after a failure that an option takes at most."""

MIN_NODE_TIMEOUT = 4
"""Shortest time in seconds in which the kernel notices that a connection is lost."""

MAX_MEGABYTES = 1_000_000_000
"""Megabytes that an option takes at most."""

HEALTH_LEVELS = ("off", "quick", "full")
"""How thoroughly `--health` examines a node."""

ACCEPTABLE = {
    "data": "the training data differs from that of the checkpoint",
    "missing-state": "the checkpoint lacks optimizer or module state, which then starts empty",
}
"""Differences from the checkpoint that a user can accept, and what each means."""


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
