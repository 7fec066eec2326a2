"""`launcher cancel`: cancel the Slurm jobs of runs."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli.completing import complete_runs
from launcher.console.echo import echo
from launcher.errors import RunDirError


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

    jobs, damages = {}, []
    for run_dir in find_submissions(what, Path()):
        try:
            jobs[run_dir.shown] = read_submission(run_dir).job
        except RunDirError as error:
            damages.append(str(error))
    if jobs:
        cancel(list(jobs.values()))
    for shown, job in jobs.items():
        echo(f"{shown}: job {job} is cancelled")
    if damages:
        raise RunDirError("\n".join(damages))
