"""`launcher status`: show the status of submitted runs."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli.completing import complete_runs
from launcher.console.echo import echo


@click.command(short_help="Show the status of submitted runs.")
@click.argument("name", required=False, metavar="[RUN|JOB]", shell_complete=complete_runs)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, *, as_json: bool) -> None:
    """Show the status of a submitted run, or of all submitted runs below this folder.

    A run is given by its folder RUN or its job id JOB. RUN may also be a folder of runs, such as
    that of an array: runs in progress come first, then finished ones from the best result.

    \b
    launcher status
    launcher status runs/digits-20260101-120000
    launcher status 1234
    """
    from launcher.console.failure import failure_text
    from launcher.console.tables import table
    from launcher.json_file import encode_json
    from launcher.paths import exists, is_dir
    from launcher.runs.failure_record import read_failure
    from launcher.schedulers.run_states import list_statuses, status_of
    from launcher.schedulers.status_table import sort_statuses, status_cells, status_values
    from launcher.schedulers.submission import find_submission

    if name is None or (is_dir(name) and not exists(Path(name) / "submission.json")):
        statuses = sort_statuses(list_statuses(Path(name or ".")))
        if as_json:
            echo(encode_json([status_values(status) for status in statuses]))
        elif statuses:
            echo("\n".join(table([status_cells(status) for status in statuses])))
        else:
            echo("There is no submitted run below this folder.")
        return
    status = status_of(find_submission(name, Path()))
    if as_json:
        echo(encode_json(status_values(status)))
        return
    echo(f"{status.run_dir.shown}  job {status.submission.job}: {status.line}")
    if status.state == "failed" and (failure := read_failure(status.run_dir)) is not None:
        echo(f"\n{failure_text(failure, status.run_dir)}")
