"""Write the HTML page of a run into its folder.

The modules of the page are imported when the page is written, so that a run can be given
`write_report` without the cost of importing them.
"""

from __future__ import annotations

from pathlib import Path

from launcher.runs.files import write_atomic
from launcher.runs.rundir import RunDir


def write_report(run_dir: RunDir) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises:
        RunDirError: The folder is damaged or not writable.
    """
    from launcher.report.page import render
    from launcher.report.run_page import run_page
    from launcher.runs.history import History

    write_atomic(run_dir.report, render(run_page(History(run_dir))))
    return run_dir.report
