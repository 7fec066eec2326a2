"""Write the HTML page of a run into its folder.

This module imports the page when it is written, so that handing `write_report` to a run costs
nothing.
"""

from __future__ import annotations

from pathlib import Path

from launcher.runs.rundir import RunDir, write_atomic


def write_report(run_dir: RunDir) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises:
        RunDirError: The folder is damaged or cannot be written.
    """
    from launcher.report.page import render
    from launcher.report.run_page import run_page
    from launcher.runs.history import History

    path = run_dir.path / "report.html"
    write_atomic(path, render(run_page(History(run_dir))))
    return path
