"""`launcher report`: a page of one run, or of several side by side."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli.completing import complete_runs
from launcher.errors import RunDirError


@click.command(short_help="A page with the curves of a run, or of several.")
@click.argument(
    "runs",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    metavar="RUN...",
    shell_complete=complete_runs,
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="Where to write it. Default: RUN/report.html; of several, comparison.html here.",
)
@click.option("--open", "opens", is_flag=True, help="Show it in the browser.")
def command(runs: tuple[Path, ...], out: Path | None, *, opens: bool) -> None:
    """Write what a run did as one HTML file, which needs no network; several are laid side by side.

    RUN may be at work, or have failed. Folders of `launcher find` and `launcher tune` add what was
    measured there; where a run took its settings from a tuned.yaml, that is found.

    \b
    launcher report runs/digits-20260101-120000 --open
    launcher report runs/one runs/two --out two.html
    launcher report runs/digits-20260101-120000 runs/find-lr-digits-20260101-110000
    """
    from launcher.report.comparison import comparison_page
    from launcher.report.finder_sections import is_measured, measured_sections, tuned_folder
    from launcher.report.page import render
    from launcher.report.run_page import run_page
    from launcher.runs.history import History
    from launcher.runs.rundir import open_run_dir, write_atomic

    measured = [each for each in runs if is_measured(each)]
    histories = [History(open_run_dir(each)) for each in runs if each not in measured]
    if not histories:
        raise RunDirError(
            f"{', '.join(map(str, runs))}: what finders measured is shown with a run. Give the "
            "folder of one as well."
        )
    tuned = filter(None, map(tuned_folder, histories))
    folders = dict.fromkeys(each.resolve() for each in [*measured, *tuned])
    more = [section for folder in folders for section in measured_sections(folder)]
    if len(histories) == 1:
        page = run_page(histories[0], more)
        target = out or Path(histories[0].run_dir.shown) / "report.html"
    else:
        page = comparison_page(histories, more)
        target = out or Path("comparison.html")
    write_atomic(target, render(page))
    if target.is_file():  # rather than /dev/stdout
        click.echo(f"page: {target}")
    if opens:
        import webbrowser

        if not webbrowser.open(target.resolve().as_uri()):
            click.echo("There is no browser here to show it in.", err=True)
