"""Data files that installed packages bring along, found without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from launcher.errors import RecipeError


def packaged_file(package: str, name: str) -> Path:
    """Return where `package` has its file `name`.

    Args:
        package: As it is imported; it is not.
        name: Of the file, below the package's folder.

    Raises:
        RecipeError: The package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        path = Path(folder) / name
        if path.is_file():
            return path
    what = "is not installed" if spec is None else f"has no file {name}"
    raise RecipeError(
        f"The package {package}, which has the data, {what}. Install it with "
        f"`python -m pip install {package}`, or name a file with data=FILE."
    )
