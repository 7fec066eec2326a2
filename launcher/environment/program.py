"""The command that starts this launcher in another process.

`python -m launcher` would import a launcher.py or a folder launcher of the working folder, which a
project may well have.
"""

from __future__ import annotations

import sys
from pathlib import Path

_FIND = (
    "import sys; sys.path[:] = [each for each in sys.path if each]; import importlib.util, os; "
    'found = importlib.util.find_spec("launcher"); '
    "folders = list(found and found.submodule_search_locations or []); "
    'folders or sys.exit(f"launcher: gpu-launcher is not installed for {sys.executable}, where '
    'launcher is {found and found.origin}"); '
    'os.execv(sys.executable, [sys.executable, f"{folders[0]}/__main__.py", *sys.argv[1:]])'
)
"""Program that starts the launcher installed for an interpreter, ignoring the working folder."""


def own_program() -> list[str]:
    """Return the command that starts this launcher with this interpreter, by its file's path.

    The caller appends arguments, such as `run digits`.
    """
    return [sys.executable, str(Path(__file__).parents[1] / "__main__.py")]


def program_of(python: str) -> list[str]:
    """Return the command that starts the launcher that is installed for another interpreter.

    Args:
        python: Name or path of the interpreter on the machine where the command runs.
    """
    return [python, "-c", _FIND]
