"""`launcher status`: show the status of submitted runs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from launcher.cli.completing import complete_runs
from launcher.console.echo import echo


@click.command(short_help="Show the status of Slurm runs.")
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
    from launcher.runs.failure_record import read_failure
    from launcher.slurm.status_table import sort_statuses, status_cells, status_values
    from launcher.slurm.submission import find_submission, status_of, submissions

    if name is None or (Path(name).is_dir() and not (Path(name) / "submission.json").exists()):
        run_dirs = submissions(Path(name or "."))
        statuses = sort_statuses([status_of(run_dir, ask=False) for run_dir in run_dirs])
        if as_json:
            echo(json.dumps([status_values(status) for status in statuses]))
        elif statuses:
            echo("\n".join(table([status_cells(status) for status in statuses])))
        else:
            echo("There is no submitted run below this folder.")
        return
    status = status_of(find_submission(name, Path()))
    if as_json:
        echo(json.dumps(status_values(status)))
        return
    echo(f"{status.run_dir.shown}  job {status.submission.job}: {status.words}")
    failure = read_failure(status.run_dir)
    if status.state == "failed" and failure is not None:
        echo(f"\n{failure_text(failure, status.run_dir)}")
