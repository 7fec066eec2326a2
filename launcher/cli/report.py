"""`launcher report`: write an HTML page about one run, or a comparison of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.completing import complete_runs
from launcher.cli.values import Folder
from launcher.console.echo import complain, echo
from launcher.errors import RunDirError
from launcher.paths import is_file

if TYPE_CHECKING:
    from launcher.report.page import Page
    from launcher.runs.history import History
    from launcher.runs.rundir import RunDir


def _read_histories(paths: Sequence[Path]) -> list[History]:
    """Read runs; of several, those that cannot be read are named and left out.

    Raises:
        RunDirError: None of them can be read.
    """
    from launcher.runs.history import History
    from launcher.runs.rundir import open_run_dir

    histories, damages = [], []
    for path in paths:
        try:
            histories.append(History(open_run_dir(path)))
        except RunDirError as error:
            damages.append(str(error))
    if damages and not histories:
        raise RunDirError("\n".join(damages))
    for damage in damages:
        complain(f"{damage} The run is left out of the page.")
    return histories


@click.command(short_help="Write an HTML page about one or more runs.")
@click.argument(
    "runs",
    nargs=-1,
    required=True,
    type=Folder(),
    metavar="RUN...",
    shell_complete=complete_runs,
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="File to write. Default: RUN/report.html; ./comparison.html for several runs.",
)
@click.option("--force", is_flag=True, help="Replace a file that launcher did not write.")
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
def command(runs: tuple[Path, ...], out: Path | None, *, force: bool, opens: bool) -> None:
    """Write a self-contained HTML page about a run, or a comparison of several runs.

    A run may still be in progress, or may have failed. Folders of `launcher find` and `launcher
    tune` add their measurements; if a run took its settings from a tuned.yaml, its page includes
    that tuning. The folder of `launcher sweep` gives the page of the sweep.

    \b
    launcher report runs/digits-20260101-120000 --open
    launcher report runs/one runs/two --out two.html
    launcher report runs/digits-20260101-120000 runs/find-lr-digits-20260101-110000
    """
    from launcher.report.page import is_page, render
    from launcher.report.sweep_page import sweep_page
    from launcher.runs.files import write_atomic
    from launcher.runs.output_file import check_output, write_output
    from launcher.runs.rundir import RunDir
    from launcher.sweeps.sweep_record import is_sweep
    from launcher.sweeps.sweep_result import read_result_of_sweep

    folder: RunDir | None
    if len(runs) == 1 and is_sweep(runs[0]):
        page, folder = sweep_page(read_result_of_sweep(runs[0])), RunDir(runs[0].resolve())
    else:
        page, folder = _page_of_runs(runs)
    target = out or Path("comparison.html")
    if folder is not None and out is None:
        target = Path(folder.shown) / "report.html"
        write_atomic(
            target, render(page), remedy="Give an --out in a folder that you can write to."
        )
    else:
        check_output(target, is_page, force=force)
        write_output(target, render(page))
    if is_file(target):  # not /dev/stdout
        echo(f"page: {target}")
    if opens:
        import webbrowser

        if not webbrowser.open(target.resolve().as_uri()):
            echo("No browser was found to open the page with.", err=True)


def _page_of_runs(runs: Sequence[Path]) -> tuple[Page, RunDir | None]:
    """Return the page of runs and folders of measurements, and the folder of a single run.

    Raises:
        RunDirError: No run can be read.
    """
    from launcher.report.comparison import comparison_page
    from launcher.report.finder_sections import is_finder_folder, measured_sections, tuned_folder
    from launcher.report.run_page import run_page

    measured = [path for path in runs if is_finder_folder(path)]
    histories = _read_histories([path for path in runs if path not in measured])
    if not histories:
        raise RunDirError(
            f"{', '.join(map(str, runs))}: measurements of `launcher find` and `tune` are shown "
            "with a run: give the folder of one as well."
        )
    tuned = filter(None, map(tuned_folder, histories))
    folders = dict.fromkeys(path.resolve() for path in [*measured, *tuned])
    sections = [section for folder in folders for section in measured_sections(folder)]
    if len(histories) == 1:
        return run_page(histories[0], sections), histories[0].run_dir
    return comparison_page(histories, sections), None
