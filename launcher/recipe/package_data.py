"""Data files inside installed packages, found without importing the packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from launcher.errors import RecipeError


def packaged_file(package: str, name: str) -> Path:
    """Return the path of a data file that an installed package contains.

    Args:
        package: The name that the package is imported by. It is not imported here.
        name: The file's path, relative to the package's folder.

    Raises:
        RecipeError: The package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        path = Path(folder) / name
        if path.is_file():
            return path
    problem = "is not installed" if spec is None else f"has no file {name}"
    raise RecipeError(
        f"The data is in the package {package}, which {problem}. Install it with "
        f"`python -m pip install {package}`, or pass a file with data=FILE."
    )
