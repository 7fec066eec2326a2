"""`launcher watch`: a run that is at work, from another terminal."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from launcher.cli.completing import complete_runs
from launcher.errors import EXIT_FAILED, EXIT_RESUMABLE

if TYPE_CHECKING:
    from launcher.runs.history import History
    from launcher.runs.rundir import RunDir
    from launcher.runs.status import RunState

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_LINES = 5.0
_REST = 4.0
"""At least so many times as long as a look takes: a run may share this machine."""

_BYTES = 1 << 25
"""Of metrics.jsonl that are looked at: the last hundred thousand steps."""

_SECONDS_BETWEEN_QUESTIONS = 5.0
"""To Slurm."""

_EXIT_CODES = {"finished": 0, "stopped": EXIT_RESUMABLE}
_STOPPED_WATCHING = 130


@click.command(short_help="A run that is at work, as it goes on.")
@click.argument("what", metavar="RUN|JOB", shell_complete=complete_runs)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs, a line per look.")
def command(what: str, *, as_json: bool) -> int:
    """Show how far the run RUN is, or that of JOB, until it ends.

    It reads the run's folder: from any shell that sees it, whoever started the run. Where there is
    no terminal it prints lines. The exit code is that of the run: 0 finished, 75 stopped with a
    checkpoint, 1 otherwise. Ctrl-C ends the watching, and not the run.

    \b
    launcher watch runs/digits-20260101-120000
    launcher watch 1234
    """
    from launcher.console.progress import json_line
    from launcher.console.watch_screen import line, to_dict

    run_dir = _find(what)
    terminal: TextIO = sys.stdout
    try:
        if as_json:
            state = _follow(run_dir, lambda h, s: click.echo(json_line(to_dict(h, s))), every=1.0)
        elif terminal.isatty():
            with _live() as show:
                state = _follow(run_dir, show, every=_SECONDS_BETWEEN_LOOKS)
        else:
            echo = _changing(click.echo)
            state = _follow(run_dir, lambda h, s: echo(line(h, s)), every=_SECONDS_BETWEEN_LINES)
    except KeyboardInterrupt:
        click.echo(f"\nThe run goes on; launcher watch {what} shows it again.", err=True)
        return _STOPPED_WATCHING
    return _EXIT_CODES.get(state.name, EXIT_FAILED)


def _find(what: str) -> RunDir:
    from launcher.errors import RunDirError
    from launcher.runs.rundir import open_run_dir
    from launcher.slurm.submission import find_submission

    if Path(what, "run.yaml").is_file():
        return open_run_dir(Path(what))
    try:
        return find_submission(what, Path())
    except RunDirError:
        raise RunDirError(
            f"{what} is neither a run folder nor the job of a run that was submitted from here. "
            "`launcher runs` lists the runs below this folder."
        ) from None


def _follow(
    run_dir: RunDir, show: Callable[[History, RunState], None], *, every: float
) -> RunState:
    """Show the run until it is over; return how it ended."""
    from launcher.runs.history import History
    from launcher.runs.status import AT_WORK

    waiting = _changing(functools.partial(click.echo, err=True))
    history: History | None = None
    asked: tuple[float, RunState | None] = (0.0, None)
    while True:
        began = time.monotonic()
        if run_dir.run_yaml.is_file():
            if history is None:
                history = History(run_dir, newest=_BYTES)
            else:
                history.refresh()
        if time.monotonic() - asked[0] > _SECONDS_BETWEEN_QUESTIONS:
            asked = time.monotonic(), _by_slurm(run_dir)
        state = _now(run_dir, history, asked[1])
        if history is not None:
            show(history, state)
        else:
            waiting(f"{run_dir.shown}: {state.words}")
        if state.name not in AT_WORK:
            # A job that was asked about a moment ago may have been queued again since.
            last = _by_slurm(run_dir)
            if last is None or last.name not in AT_WORK:
                return state
        pause = every if history is not None else _SECONDS_BETWEEN_LOOKS
        time.sleep(max(pause, _REST * (time.monotonic() - began)))


def _now(run_dir: RunDir, history: History | None, by_slurm: RunState | None) -> RunState:
    """Return how the run fares: by its folder as it is now, by Slurm where the folder is silent."""
    from launcher.runs.status import read_run_state

    state = history.state if history is not None else read_run_state(run_dir)
    if state.name in ("running", "finished", "failed") or by_slurm is None:
        return state
    return by_slurm


def _by_slurm(run_dir: RunDir) -> RunState | None:
    """Return how a run fares that was submitted, where Slurm can be asked."""
    from launcher.runs.status import RunState
    from launcher.slurm.submission import status_of

    if not run_dir.submission.is_file():
        return None
    status = status_of(run_dir)
    return None if status.state == "unknown" else RunState(name=status.state, words=status.words)


def _changing(echo: Callable[[str], None]) -> Callable[[str], None]:
    """Return `echo` that leaves out what it has just said."""
    said: list[str] = []

    def once(text: str) -> None:
        if said != [text]:
            said[:] = [text]
            echo(text)

    return once


@contextlib.contextmanager
def _live() -> Iterator[Callable[[History, RunState], None]]:
    """Return what shows a run on the terminal, over what it has shown before."""
    from rich.console import Console
    from rich.live import Live

    from launcher.console.watch_screen import screen

    with Live(console=Console(), auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda history, state: live.update(screen(history, state), refresh=True)
