"""Where files of the project are on machines that have a copy of its folder, such as an image."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import UsageError
from launcher.recipe.resolve import BUNDLED


def location_in_project(location: str, why: str) -> str:
    """Return where a recipe is there: a module, or a file relative to the project's folder.

    Args:
        location: The recipe as module:function or /path/of/file.py:function.
        why: Why a file outside the working folder is missing there, as the end of a clause.

    Raises:
        UsageError: The file is outside the working folder.
    """
    place, _, function = location.rpartition(":")
    if not place.startswith("/"):
        return location
    path = Path(place)
    if path.parent in (BUNDLED, BUNDLED.parent / "recipes"):
        return f"launcher.recipes.{path.stem}:{function}"
    return f"{path_in_project(path, why)}:{function}"


def path_in_project(path: Path, why: str) -> str:
    """Return the path of a file relative to the project's folder, which is the working folder.

    Args:
        path: The file.
        why: Why a file outside the working folder is missing there, as the end of a clause.

    Raises:
        UsageError: The file is outside the working folder.
    """
    try:
        return str(path.relative_to(Path.cwd().resolve()))
    except ValueError:
        raise UsageError(
            f"{path} is outside the working folder {Path.cwd()}, {why}. Start the command in the "
            "project's folder."
        ) from None
