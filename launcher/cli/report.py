"""`launcher report`: write an HTML page about one run, or a comparison of several."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli.completing import complete_runs
from launcher.console.echo import echo
from launcher.errors import RunDirError


@click.command(short_help="Write an HTML page about one or more runs.")
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
    help="File to write. Default: RUN/report.html; ./comparison.html for several runs.",
)
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
def command(runs: tuple[Path, ...], out: Path | None, *, opens: bool) -> None:
    """Write a self-contained HTML page about a run, or a comparison of several runs.

    A run may still be in progress, or may have failed. Folders of `launcher find` and `launcher
    tune` add their measurements; if a run took its settings from a tuned.yaml, its page includes
    that tuning.

    \b
    launcher report runs/digits-20260101-120000 --open
    launcher report runs/one runs/two --out two.html
    launcher report runs/digits-20260101-120000 runs/find-lr-digits-20260101-110000
    """
    from launcher.report.comparison import comparison_page
    from launcher.report.finder_sections import is_finder_folder, measured_sections, tuned_folder
    from launcher.report.page import render
    from launcher.report.run_page import run_page
    from launcher.runs.history import History
    from launcher.runs.rundir import open_run_dir, write_atomic

    measured = [path for path in runs if is_finder_folder(path)]
    histories = [History(open_run_dir(path)) for path in runs if path not in measured]
    if not histories:
        raise RunDirError(
            f"{', '.join(map(str, runs))}: measurements of `launcher find` and `tune` are shown "
            "with a run: give the folder of one as well."
        )
    tuned = filter(None, map(tuned_folder, histories))
    folders = dict.fromkeys(path.resolve() for path in [*measured, *tuned])
    sections = [section for folder in folders for section in measured_sections(folder)]
    if len(histories) == 1:
        page = run_page(histories[0], sections)
        target = out or Path(histories[0].run_dir.shown) / "report.html"
    else:
        page = comparison_page(histories, sections)
        target = out or Path("comparison.html")
    write_atomic(target, render(page))
    if target.is_file():  # not /dev/stdout
        echo(f"page: {target}")
    if opens:
        import webbrowser

        if not webbrowser.open(target.resolve().as_uri()):
            echo("No browser was found to open the page with.", err=True)
