"""The folder of a run that starts, made and owned before anything is written into it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from launcher.paths import exists
from launcher.runs.ownership import check_unowned, own_run_dir
from launcher.runs.run_record import RunRecord, write_resumption, write_run
from launcher.runs.rundir import RunDir, create_run_dir


def open_run_folder(
    out: Path | None,
    recipe: str,
    description: RunRecord,
    ownership: ExitStack,
    *,
    continues: bool = False,
    with_ranks: bool = False,
) -> RunDir:
    """Make the folder of a run, or take one that exists, and own it before it is changed.

    Args:
        out: The folder; None makes one below runs/.
        recipe: The recipe's name.
        description: The content of run.yaml.
        ownership: Ends the ownership of the folder when it is closed.
        continues: Whether `out` may hold a run, or may have been made by `launcher submit`.
        with_ranks: Whether forked ranks keep the folder owned after this process has ended.

    Raises:
        RunDirError: Another process owns the folder, it exists, or it cannot be made.
    """
    existing = RunDir(out.resolve()) if out is not None else None
    if existing and continues and (exists(existing.run_yaml) or exists(existing.submission)):
        ownership.enter_context(own_run_dir(existing, with_ranks=with_ranks))
        if exists(existing.run_yaml):
            write_resumption(existing, description)
        else:
            write_run(existing, description)
        return existing
    if out is not None:
        check_unowned(out)
    run_dir = create_run_dir(out, recipe)
    ownership.enter_context(own_run_dir(run_dir, with_ranks=with_ranks))
    write_run(run_dir, description)
    return run_dir
