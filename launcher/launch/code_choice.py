"""Which code a resumed run imports: the copy that it was planned with, or its project.

A run that imports its project directly is not resumed with other code by accident: files that the
recipe imports, and that differ from those of the run, are named first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import RunDirError
from launcher.paths import exists, is_dir
from launcher.planning.derivations import counted
from launcher.printable import printable_line
from launcher.recipe.frozen_code import FrozenCode
from launcher.recipe.project_code import changed_files
from launcher.runs.freezing import open_frozen
from launcher.runs.run_record import CodeRecord, RunRecord, read_run
from launcher.runs.rundir import RunDir

_NUM_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class ChosenCode:
    """The code that a resumed run imports."""

    recipe: str
    """The location of the recipe."""

    code: FrozenCode | None = None
    """The copy of its project; None imports the project itself."""

    changes: tuple[str, ...] = ()
    """What differs from the run so far, for its user."""


def choose_code(record: RunRecord, run_dir: RunDir, *, allow_change: bool) -> ChosenCode:
    """Return the code with which a run is resumed.

    Args:
        record: The content of run.yaml.
        run_dir: The run folder, for the message.
        allow_change: Whether the project's present code is taken although it differs.

    Raises:
        RunDirError: The code differs, and it may not; or the run's copy of it is missing.
    """
    code = record.code
    if code is None:
        return ChosenCode(recipe=record.recipe)
    differences = code_differences(code)
    if code.copy is None:
        if differences and not allow_change:
            raise RunDirError(
                f"{run_dir.shown} began with other code than {code.project} has now. What differs: "
                f"{differences}. Restore what the run began with, or resume it with the present "
                "code: --allow-code-change."
            )
        changes = (f"code in {differences}",) if differences else ()
        return ChosenCode(recipe=record.recipe, changes=changes)
    copy = Path(code.copy)
    if allow_change:
        recipe = _original(record.recipe, FrozenCode(project=Path(code.project), copy=copy))
        text = f"code from {code.project} instead of {copy}"
        text += f"; what differs: {differences}" if differences else ""
        return ChosenCode(recipe=recipe, changes=(text,))
    note = (
        f"not the code, although {code.project} has other code now in {differences}: the run keeps "
        "the copy that it was planned with, unless --allow-code-change is given"
    )
    return ChosenCode(
        recipe=record.recipe, code=open_frozen(copy), changes=(note,) if differences else ()
    )


def code_of_continued(out: Path) -> FrozenCode | None:
    """Return the copy of the code that the run in a folder imports.

    It is None if there is no run in the folder, or if it imports its project.

    Raises:
        RunDirError: run.yaml is damaged, or the copy is missing.
    """
    run_dir = RunDir(out.resolve())
    if not exists(run_dir.run_yaml):
        return None
    code = read_run(run_dir).code
    return None if code is None or code.copy is None else open_frozen(Path(code.copy))


def code_differences(code: CodeRecord) -> str:
    """Return which files of a project differ from those of a run, or nothing if none does."""
    if not is_dir(code.project):
        return ""  # the error about the recipe says more
    changed = changed_files(Path(code.project), code.files)
    which = f"{len(changed)} of the recipe's {counted(len(code.files), 'file')}"
    return f"{_named(changed)} ({which})" if changed else ""


def _named(files: Sequence[str]) -> str:
    named = ", ".join(map(printable_line, files[:_NUM_NAMED]))
    more = len(files) - _NUM_NAMED
    return f"{named} and {more} more" if more > 0 else named


def _original(recipe: str, code: FrozenCode) -> str:
    name, _, function = recipe.rpartition(":")
    return f"{code.original(Path(name))}:{function}" if Path(name).is_absolute() else recipe
