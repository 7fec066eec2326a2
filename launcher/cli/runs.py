"""`launcher runs`: list run folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.console.echo import echo
from launcher.errors import UsageError

if TYPE_CHECKING:
    from launcher.console.run_table import RunRow


@click.command(short_help="List the runs below a folder.")
@click.argument("where", nargs=-1, metavar="[DIR|URL|NAME=VALUE]...")
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
    """List the runs below the working folder, or below each DIR or URL; NAME=VALUE filters them.

    The list is read from the run folders alone. `launcher status` asks Slurm as well.

    \b
    launcher runs
    launcher runs state=finished recipe=digits --sort accuracy --reverse
    launcher runs runs/sweep lr=0.1 --json
    launcher runs s3://bucket/runs
    """
    from launcher.console.colours import colour_state
    from launcher.console.run_table import filter_rows, read_row, row_values, sort_rows, table_lines
    from launcher.json_file import encode_json
    from launcher.object_stores.locations import is_url
    from launcher.paths import exists, is_dir
    from launcher.runs.rundir import find_run_dirs

    filters, folders, urls = [], [], []
    for argument in where:
        name, equals, value = argument.partition("=")
        if is_url(argument):
            urls.append(argument)
        elif equals and not exists(argument):
            filters.append((name, value))
        elif not is_dir(argument):
            raise UsageError(
                f"{argument} is neither a folder nor a URL nor NAME=VALUE. Give a folder of runs, "
                "or a filter such as state=failed."
            )
        else:
            folders.append(Path(argument))
    if not (folders or urls):
        folders = [Path()]
    run_dirs = (run_dir for folder in folders for run_dir in find_run_dirs(folder))
    all_rows = [row for row in map(read_row, run_dirs) if row is not None]
    all_rows += [row for url in urls for row in _stored_rows(url)]
    rows = sort_rows(filter_rows(all_rows, filters), by, reverse=reverse)
    if as_json:
        echo(encode_json([row_values(row) for row in rows]))
    elif not all_rows:
        echo(f"There is no run below this {'URL' if urls else 'folder'}.")
    elif not rows:
        echo(f"None of the {len(all_rows)} runs matches.")
    else:
        head, *rest = table_lines(rows)
        echo(head, style=partial(click.style, bold=True))
        for line, row in zip(rest, rows, strict=True):
            echo(line, style=partial(colour_state, state=row.state))


def _stored_rows(url: str) -> Iterator[RunRow]:
    """Yield the rows of the runs below a URL."""
    from launcher.console.run_table import read_row
    from launcher.mirrors.stored_runs import read_runs
    from launcher.object_stores.locations import shown_url
    from launcher.object_stores.object_store import ObjectStore

    for stored in read_runs(ObjectStore(url)):
        row = read_row(stored.run_dir)
        if row is None:
            continue
        state = "running" if stored.is_owned and row.state == "lost" else row.state
        yield replace(row, run=shown_url(stored.url), state=state)
