"""`launcher watch`: show a run in progress from another terminal."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from launcher.cli.completing import complete_runs
from launcher.console.echo import complain, echo
from launcher.errors import EXIT_FAILED, EXIT_RESUMABLE, UsageError
from launcher.printable import shortened

if TYPE_CHECKING:
    from launcher.runs.history import History
    from launcher.runs.prometheus import MetricsFile
    from launcher.runs.rundir import RunDir
    from launcher.runs.status import RunState

_SECONDS_BETWEEN_SCREENS = 0.5
_SECONDS_BETWEEN_JSON_LINES = 1.0
_SECONDS_BETWEEN_LINES = 5.0

_EXIT_CODES = {"finished": 0, "stopped": EXIT_RESUMABLE}
_EXIT_INTERRUPTED = 130


@click.command(
    short_help="Show a run in progress, or run a recipe again after each edit.",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("name", metavar="RUN|JOB|RECIPE", shell_complete=complete_runs)
@click.argument(
    "arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS OF launcher run]..."
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON every second.")
@click.option(
    "--prometheus",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the run's numbers to FILE in Prometheus' text format, every ten seconds.",
)
@click.option(
    "--follow-edits",
    "follows_edits",
    is_flag=True,
    help="Train RECIPE now, and again on a warm server whenever its file or a module that it "
    "imports is saved. A run in progress stops with a checkpoint. Ctrl-C ends.",
)
def command(
    name: str,
    arguments: tuple[str, ...],
    prometheus: Path | None,
    *,
    as_json: bool,
    follows_edits: bool,
) -> int:
    """Show the progress of a run, given by its folder RUN or its job id JOB, until it ends.

    It reads the run folder, so it works in any shell that sees the folder, however the run was
    started. Without a terminal it prints lines. The exit code is that of the run: 0 finished, 75
    stopped with a checkpoint, 1 otherwise. Ctrl-C stops watching; the run continues.

    \b
    launcher watch runs/digits-20260101-120000
    launcher watch 1234
    launcher watch 1234 --prometheus /var/lib/prometheus/node-exporter/1234.prom
    launcher watch --follow-edits recipes/mine.py -n 2 epochs=1
    """
    if follows_edits:
        from launcher.warm.edited_recipe import follow_edits

        return follow_edits(name, (*arguments, *(["--json"] if as_json else [])), complain)
    if arguments:
        raise UsageError(
            f"launcher watch takes one run, and {shortened(arguments[0])} comes after it. "
            "--follow-edits takes a recipe and arguments of `launcher run`."
        )
    from launcher.console.progress import json_line
    from launcher.console.watch_screen import status_line, status_values
    from launcher.runs.prometheus import MetricsFile
    from launcher.schedulers.follow import find_run

    run_dir = find_run(name)
    metrics_file = None if prometheus is None else MetricsFile(run_dir, prometheus)
    follow = functools.partial(_follow, metrics_file)
    terminal: TextIO = sys.stdout
    show_waiting = _without_repeats(functools.partial(echo, err=True))
    try:
        if as_json:
            state = follow(
                run_dir,
                lambda history, state: echo(json_line(status_values(history, state))),
                show_waiting,
                seconds=_SECONDS_BETWEEN_JSON_LINES,
            )
        elif terminal.isatty():
            with _live_screen() as show:
                state = follow(run_dir, show, show_waiting, seconds=_SECONDS_BETWEEN_SCREENS)
        else:
            show_line = _without_repeats(echo)
            state = follow(
                run_dir,
                lambda history, state: show_line(status_line(history, state)),
                show_waiting,
                seconds=_SECONDS_BETWEEN_LINES,
            )
    except KeyboardInterrupt:
        echo(f"\nThe run continues; `launcher watch {name}` shows it again.", err=True)
        return _EXIT_INTERRUPTED
    return _EXIT_CODES.get(state.name, EXIT_FAILED)


def _follow(
    metrics_file: MetricsFile | None,
    run_dir: RunDir,
    show: Callable[[History, RunState], None],
    show_waiting: Callable[[str], None],
    *,
    seconds: float,
) -> RunState:
    """Follow a run as `follow` does, and write its numbers if there is a file for them."""
    from launcher.schedulers.follow import follow

    if metrics_file is None:
        return follow(run_dir, show, show_waiting, seconds=seconds)

    def show_and_write(history: History, state: RunState) -> None:
        metrics_file.write(state)
        show(history, state)

    state = follow(run_dir, show_and_write, show_waiting, seconds=seconds)
    metrics_file.write(state, now=True)
    return state


def _without_repeats(echo: Callable[[str], None]) -> Callable[[str], None]:
    """Return a version of `echo` that prints a text only if it differs from the last one."""
    last: str | None = None

    def echo_change(text: str) -> None:
        nonlocal last
        if text != last:
            last = text
            echo(text)

    return echo_change


@contextlib.contextmanager
def _live_screen() -> Iterator[Callable[[History, RunState], None]]:
    """Yield a function that draws a run on the terminal over what it drew before."""
    from rich.console import Console
    from rich.live import Live

    from launcher.console.watch_screen import Printable, screen

    with Live(console=Console(), auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda history, state: live.update(Printable(screen(history, state)), refresh=True)
