"""The recipe of a run, built again from run.yaml in the folder in which the run was started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from launcher.paths import is_dir
from launcher.recipe.overrides import Override, build
from launcher.recipe.recipe import Recipe
from launcher.recipe.resolve import Reference, resolve
from launcher.runs.freezing import open_frozen
from launcher.runs.run_record import RunRecord, read_run
from launcher.runs.rundir import RunDir


@contextlib.contextmanager
def rebuilt_recipe(run_dir: RunDir, overrides: tuple[Override, ...]) -> Iterator[Recipe]:
    """Build the recipe of a run, and work in the run's folder for the duration of the context.

    Args:
        run_dir: The run.
        overrides: Values that replace those of the run.

    Raises:
        LauncherError: run.yaml cannot be read, or the recipe cannot be built.
    """
    record = read_run(run_dir)
    with working_folder(folder_of(record)):
        yield build(resolve_recorded(record), (*overrides_of(record), *overrides)).recipe


def resolve_recorded(record: RunRecord) -> Reference:
    """Import and return the recipe of a run, from the copy of its code if it has one.

    Raises:
        LauncherError: The copy is missing, or the recipe cannot be imported.
    """
    copy = None if record.code is None else record.code.copy
    return resolve(record.recipe, None if copy is None else open_frozen(Path(copy)))


def overrides_of(record: RunRecord) -> tuple[Override, ...]:
    """Return the values that replaced those of the recipe in a run."""
    return tuple(
        Override(name=name, value=value, source="run.yaml")
        for name, value in record.overrides.items()
    )


def folder_of(record: RunRecord) -> Path:
    """Return the folder in which a run was started, or the present one if it is gone."""
    return folder_of_command(record.folder)


def folder_of_command(folder: str) -> Path:
    """Return the folder in which a command was given, or the present one if it is gone."""
    return Path(folder) if is_dir(folder) else Path.cwd()


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    """Work in a folder for the duration of the context."""
    previous = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(previous)
