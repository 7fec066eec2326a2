"""The folder of a run that starts, made and owned before anything is written into it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.launch.prepare import PreparedRun
from launcher.launch.typed_recipe import keep_recipe
from launcher.paths import exists
from launcher.recipe.frozen_code import import_from
from launcher.recipe.resolve import Reference
from launcher.runs.freezing import open_frozen
from launcher.runs.ownership import check_unowned, own_run_dir
from launcher.runs.run_record import RunRecord, read_run, write_resumption, write_run
from launcher.runs.rundir import RunDir, create_run_dir

if TYPE_CHECKING:
    from launcher.launch.multi_node import NodeGroup


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


def in_folder(prepared: PreparedRun, run_dir: RunDir, group: NodeGroup | None) -> PreparedRun:
    """Return a run with its folder, and with the recipe as the ranks import it.

    Raises:
        RunDirError: This node does not see the copy of the project.
    """
    reference = keep_recipe(prepared.reference, run_dir)
    if group is not None or prepared.request.mirror is not None:
        reference = _frozen(reference, run_dir)
    return replace(prepared, run_dir=run_dir, reference=reference)


def _frozen(reference: Reference, run_dir: RunDir) -> Reference:
    """Return a recipe as the ranks of several nodes import it: from the copy of its project.

    Raises:
        RunDirError: This node does not see the copy.
    """
    record = read_run(run_dir)
    if reference.code is not None or record.code is None or record.code.copy is None:
        return reference
    code = open_frozen(Path(record.code.copy))
    import_from(code)
    return replace(reference, location=record.recipe, code=code)
