"""`launcher cancel`: take submitted runs out of the queue, or end them."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli.completing import complete_runs


@click.command(short_help="End a run that was submitted.")
@click.argument("what", metavar="RUN|JOB", shell_complete=complete_runs)
def command(what: str) -> None:
    """End the run RUN, or that of JOB; what runs saves a checkpoint first, if it is given the time.

    RUN may be the folder of an array.

    \b
    launcher cancel runs/digits-20260101-120000
    launcher cancel 1234
    """
    from launcher.slurm.queue import cancel
    from launcher.slurm.submission import find_submissions, read_submission

    found = find_submissions(what, Path())
    cancel([read_submission(run_dir).job for run_dir in found])
    for run_dir in found:
        click.echo(f"{run_dir.shown}: job {read_submission(run_dir).job} is cancelled")
