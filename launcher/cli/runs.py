"""`launcher runs`: a table of run folders."""

from __future__ import annotations

import json
from pathlib import Path

import click

from launcher.errors import UsageError


@click.command(short_help="A table of the runs below a folder.")
@click.argument("where", nargs=-1, metavar="[DIR|NAME=VALUE]...")
@click.option(
    "--sort",
    "by",
    default="began",
    show_default=True,
    metavar="NAME",
    help="state, recipe, ranks, step, seconds, began, a metric or a setting.",
)
@click.option("--reverse", is_flag=True, help="The largest first.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, a list.")
def command(where: tuple[str, ...], by: str, *, reverse: bool, as_json: bool) -> None:
    """List the runs below this folder, or below each DIR, of which every NAME=VALUE holds.

    What is shown comes from their folders alone. `launcher status` asks Slurm as well.

    \b
    launcher runs
    launcher runs state=finished recipe=digits --sort accuracy --reverse
    launcher runs runs/sweep lr=0.1 --json
    """
    from launcher.console.colours import painted
    from launcher.console.run_table import chosen, lines, listed, ordered, to_dict
    from launcher.runs.rundir import folders_of_runs

    filters, folders = [], []
    for each in where:
        name, equals, value = each.partition("=")
        if equals and not Path(each).exists():
            filters.append((name, value))
        elif not Path(each).is_dir():
            raise UsageError(f"{each} is neither a folder nor NAME=VALUE.")
        else:
            folders.append(Path(each))
    below = (each for folder in folders or [Path()] for each in folders_of_runs(folder))
    found = [row for row in map(listed, below) if row is not None]
    rows = ordered(chosen(found, filters), by, reverse=reverse)
    if as_json:
        click.echo(json.dumps([to_dict(row) for row in rows]))
    elif not found:
        click.echo("There is no run below this folder.")
    elif not rows:
        click.echo(f"None of the {len(found)} runs is like that.")
    else:
        head, *rest = lines(rows)
        click.secho(head, bold=True)
        for line, row in zip(rest, rows, strict=True):
            click.echo(painted(line, row.state))
