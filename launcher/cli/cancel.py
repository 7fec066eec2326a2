"""`launcher cancel`: cancel the Slurm jobs of runs."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli.completing import complete_runs
from launcher.console.echo import echo


@click.command(short_help="Cancel the Slurm job of a run.")
@click.argument("what", metavar="RUN|JOB", shell_complete=complete_runs)
def command(what: str) -> None:
    """Cancel the Slurm job of a run, given by its folder RUN or its job id JOB.

    A run in progress saves a checkpoint first, if Slurm's KillWait leaves it the time. If RUN is
    the folder of an array, all of its jobs are cancelled.

    \b
    launcher cancel runs/digits-20260101-120000
    launcher cancel 1234
    """
    from launcher.slurm.queue import cancel
    from launcher.slurm.submission import find_submissions, read_submission

    run_dirs = find_submissions(what, Path())
    cancel([read_submission(run_dir).job for run_dir in run_dirs])
    for run_dir in run_dirs:
        echo(f"{run_dir.shown}: job {read_submission(run_dir).job} is cancelled")
