"""`launcher logs`: print the output of a submitted run."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable
from pathlib import Path

import click

from launcher.cli.completing import complete_runs
from launcher.cli.values import Count
from launcher.console.echo import echo


@click.command(short_help="Print the output of a submitted run.")
@click.argument("name", metavar="RUN|JOB", shell_complete=complete_runs)
@click.option("-f", "--follow", is_flag=True, help="Continue until the run has ended.")
@click.option(
    "--rank", type=Count(min=0, largest=10**9), metavar="R", help="Print the log of one rank."
)
def command(name: str, rank: int | None, *, follow: bool) -> None:
    """Print the output of the job of a run, given by its folder RUN or its job id JOB.

    A terminal shows control characters as escapes, such as \\x1b, because a recipe may print
    anything. A pipe or a file gets the bytes of the log: `launcher logs 1234 | cat` shows colours.

    \b
    launcher logs runs/digits-20260101-120000 -f
    launcher logs 1234 --rank 3
    """
    from launcher.schedulers.follow import copy_log_file
    from launcher.schedulers.scheduler import find_scheduler
    from launcher.schedulers.submission import SubmittedRun, find_submission, read_submission

    run_dir = find_submission(name, Path())
    run = SubmittedRun(run_dir=run_dir, submission=read_submission(run_dir))
    write = _terminal_writer() if sys.stdout.isatty() else _write
    if rank is not None:
        copy_log_file(run_dir.log(rank), run_dir, write, follows=follow)
    else:
        find_scheduler(run.submission.scheduler).copy_log(run, write, follows=follow)


def _write(content: bytes) -> None:
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def _terminal_writer() -> Callable[[bytes], None]:
    """Return a function that shows the next bytes of a log on a terminal."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    return lambda content: echo(decoder.decode(content), newline=False, keep="\r")
