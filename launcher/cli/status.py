"""`launcher status`: how runs that were submitted fare."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.completing import complete_runs

if TYPE_CHECKING:
    from launcher.slurm.submission import SubmissionStatus


@click.command(short_help="How runs that were submitted fare.")
@click.argument("what", required=False, metavar="[RUN|JOB]", shell_complete=complete_runs)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(what: str | None, *, as_json: bool) -> None:
    """Say how the run RUN, or that of JOB, fares; or all below this folder, those at work first.

    RUN may be the folder of an array: its runs are sorted by what they came to.

    \b
    launcher status
    launcher status runs/digits-20260101-120000
    launcher status 1234
    """
    from launcher.console.failure import failure_text
    from launcher.runs.failure_record import read_failure
    from launcher.slurm.submission import find_submission, status_of, submissions

    if what is None or (Path(what).is_dir() and not (Path(what) / "submission.json").exists()):
        rows = [status_of(run_dir, ask=False) for run_dir in submissions(Path(what or "."))]
        rows.sort(key=_rank)
        if as_json:
            click.echo(json.dumps([_values(row) for row in rows]))
        elif rows:
            click.echo(_table(rows))
        else:
            click.echo("No run below this folder was submitted.")
        return
    found = status_of(find_submission(what, Path()))
    if as_json:
        click.echo(json.dumps(_values(found)))
        return
    click.echo(f"{found.run_dir.shown}  job {found.submission.job}: {found.words}")
    failure = read_failure(found.run_dir)
    if found.state == "failed" and failure is not None:
        click.echo(f"\n{failure_text(failure, found.run_dir)}")


def _values(row: SubmissionStatus) -> dict[str, object]:
    values = {"run": str(row.run_dir.path), "state": row.state, "words": row.words}
    return values | {"evaluation": row.evaluation} | asdict(row.submission)


def _rank(row: SubmissionStatus) -> tuple[float, ...]:
    """Return what to sort by: those at work first, and of the finished the best."""
    accuracy = max((v for name, v in row.evaluation.items() if name != "loss"), default=None)
    loss = row.evaluation.get("loss", 0.0)
    from launcher.runs.status import STATES

    return (STATES.index(row.state), loss if accuracy is None else -accuracy, loss)


def _table(rows: list[SubmissionStatus]) -> str:
    from launcher.console.tables import table

    cells = [
        (row.run_dir.shown, row.submission.job, " ".join(row.submission.settings), row.words)
        for row in rows
    ]
    return "\n".join(table(cells))
