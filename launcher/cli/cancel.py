"""`launcher cancel`: cancel the jobs of runs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.completing import complete_runs
from launcher.console.echo import echo
from launcher.errors import RunDirError

if TYPE_CHECKING:
    from launcher.schedulers.submission import SchedulerName


@click.command(short_help="Cancel the job of a run.")
@click.argument("what", metavar="RUN|JOB", shell_complete=complete_runs)
def command(what: str) -> None:
    """Cancel the job of a run, given by its folder RUN or its job id JOB.

    A run in progress saves a checkpoint first, if the scheduler leaves it the time: KillWait in
    Slurm, grace_seconds of the profile in Kubernetes. If RUN is the folder of an array, all of its
    jobs are cancelled.

    \b
    launcher cancel runs/digits-20260101-120000
    launcher cancel 1234
    """
    from launcher.schedulers.scheduler import find_scheduler
    from launcher.schedulers.submission import SubmittedRun, find_submissions, read_submission

    runs: defaultdict[SchedulerName, list[SubmittedRun]] = defaultdict(list)
    damages = []
    for run_dir in find_submissions(what, Path()):
        try:
            run = SubmittedRun(run_dir=run_dir, submission=read_submission(run_dir))
            runs[run.submission.scheduler].append(run)
        except RunDirError as error:
            damages.append(str(error))
    for scheduler, its_runs in runs.items():
        find_scheduler(scheduler).cancel(its_runs)
        for run in its_runs:
            echo(f"{run.run_dir.shown}: job {run.submission.job} is cancelled")
    if damages:
        raise RunDirError("\n".join(damages))
