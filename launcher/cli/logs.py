"""`launcher logs`: what a run printed."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.completing import complete_runs

if TYPE_CHECKING:
    from launcher.runs.rundir import RunDir

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_QUESTIONS = 5.0


@click.command(short_help="What a run printed.")
@click.argument("what", metavar="RUN|JOB", shell_complete=complete_runs)
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended.")
@click.option("--rank", type=click.IntRange(min=0), metavar="R", help="Of one rank alone.")
def command(what: str, rank: int | None, *, follow: bool) -> None:
    """Print what the job of the run RUN printed, or one of its ranks.

    \b
    launcher logs runs/digits-20260101-120000 -f
    launcher logs 1234 --rank 3
    """
    from launcher.errors import RunDirError
    from launcher.slurm.submission import find_submission, read_submission

    run_dir = find_submission(what, Path())
    path = Path(read_submission(run_dir).log) if rank is None else run_dir.log(rank)
    if not path.exists() and not follow:
        ranks = sorted(int(each.stem[4:]) for each in path.parent.glob("rank*.log"))
        known = f" It has logs of the ranks {', '.join(map(str, ranks))}." if ranks else ""
        raise RunDirError(f"{path} is not there: nothing was printed yet.{known}")
    _print(path, run_dir if follow else None)


def _print(path: Path, run_dir: RunDir | None) -> None:
    """Print a file; of a run that is followed, what is added to it until the run has ended."""
    from launcher.slurm.submission import status_of

    position, asked = 0, 0.0
    ends = run_dir is None
    while True:
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as file:
                file.seek(position)
                shutil.copyfileobj(file, sys.stdout)
                position = file.tell()
            sys.stdout.flush()
        if ends:
            return
        if run_dir is not None and time.monotonic() - asked > _SECONDS_BETWEEN_QUESTIONS:
            asked = time.monotonic()
            ends = status_of(run_dir).state not in ("waiting", "running")
        if not ends:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
