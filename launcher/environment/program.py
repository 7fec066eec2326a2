"""How another process starts this launcher, whatever else is called `launcher` where it runs.

`python -m launcher` takes what the working folder has under that name, and a project may have a
launcher.py or a folder launcher of its own.
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
"""Finds the launcher that is installed for an interpreter, leaving out the working folder."""


def own_program() -> list[str]:
    """Return the command that starts this launcher with this interpreter, by the path of its file.

    Arguments follow, such as `run digits`.
    """
    return [sys.executable, str(Path(__file__).parents[1] / "__main__.py")]


def program_of(python: str) -> list[str]:
    """Return the command that starts the launcher installed for another interpreter.

    Args:
        python: The interpreter's name or path, where the command will run.
    """
    return [python, "-c", _FIND]
