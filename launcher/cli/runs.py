"""`launcher runs`: list run folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from launcher.console.echo import echo
from launcher.errors import UsageError


@click.command(short_help="List the runs below a folder.")
@click.argument("where", nargs=-1, metavar="[DIR|NAME=VALUE]...")
@click.option(
    "--sort",
    "by",
    default="began",
    show_default=True,
    metavar="NAME",
    help="Sort by state, recipe, ranks, step, seconds, began, a metric or a setting.",
)
@click.option("--reverse", is_flag=True, help="Sort in descending order.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def command(where: tuple[str, ...], by: str, *, reverse: bool, as_json: bool) -> None:
    """List the runs below the working folder, or below each DIR; NAME=VALUE filters them.

    The list is read from the run folders alone. `launcher status` asks Slurm as well.

    \b
    launcher runs
    launcher runs state=finished recipe=digits --sort accuracy --reverse
    launcher runs runs/sweep lr=0.1 --json
    """
    from launcher.console.colours import colour_state
    from launcher.console.run_table import filter_rows, read_row, row_values, sort_rows, table_lines
    from launcher.json_file import encode_json
    from launcher.paths import exists, is_dir
    from launcher.runs.rundir import find_run_dirs

    filters, folders = [], []
    for argument in where:
        name, equals, value = argument.partition("=")
        if equals and not exists(argument):
            filters.append((name, value))
        elif not is_dir(argument):
            raise UsageError(
                f"{argument} is neither a folder nor NAME=VALUE. Give a folder of runs, or a "
                "filter such as state=failed."
            )
        else:
            folders.append(Path(argument))
    run_dirs = (run_dir for folder in folders or [Path()] for run_dir in find_run_dirs(folder))
    all_rows = [row for row in map(read_row, run_dirs) if row is not None]
    rows = sort_rows(filter_rows(all_rows, filters), by, reverse=reverse)
    if as_json:
        echo(encode_json([row_values(row) for row in rows]))
    elif not all_rows:
        echo("There is no run below this folder.")
    elif not rows:
        echo(f"None of the {len(all_rows)} runs matches.")
    else:
        head, *rest = table_lines(rows)
        echo(head, style=partial(click.style, bold=True))
        for line, row in zip(rest, rows, strict=True):
            echo(line, style=partial(colour_state, state=row.state))
