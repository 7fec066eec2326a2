"""Optional packages that read one format each."""

from __future__ import annotations

import importlib
from types import ModuleType

from launcher.errors import RecipeError
from launcher.printable import printable_line


def import_extra(package: str, extra: str, reads: str) -> ModuleType:
    """Return an optional package.

    Args:
        package: The name of the package.
        extra: The extra of the launcher that installs it.
        reads: What it reads, for the message.

    Raises:
        RecipeError: It cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RecipeError(
            f"Reading {reads} needs {package}, which cannot be imported: "
            f"{printable_line(str(error))}. Install it with `pip install 'gpu-launcher[{extra}]'`."
        ) from None
