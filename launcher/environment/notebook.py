"""Whether this process is a notebook or an interactive shell, which has arguments of its own."""

from __future__ import annotations

import sys
from pathlib import Path

_PROGRAMS = ("ipykernel_launcher.py", "colab_kernel_launcher.py", "pydevconsole.py")
"""Programs that run code which is typed into them, and are started with arguments of their own."""


def has_own_arguments() -> bool:
    """Return whether `sys.argv` holds the arguments of the program that the user started.

    The kernel of a notebook has those that Jupyter started it with, and code in a cell, or at the
    prompt of IPython, is no program. `%run mine.py epochs=1` is one: it has arguments of its own.
    """
    if Path(sys.argv[0] if sys.argv else "").name in _PROGRAMS:
        return False
    is_typed = not hasattr(sys.modules["__main__"], "__file__")
    return not (is_typed and _has_ipython())


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, which shows HTML."""
    return hasattr(_shell(), "kernel")


def at_prompt() -> bool:
    """Return whether code is typed at a prompt in a terminal, of Python or of IPython."""
    has_prompt = hasattr(sys, "ps1") or (_has_ipython() and not in_notebook())
    return has_prompt and sys.stdout is not None and sys.stdout.isatty()


def _has_ipython() -> bool:
    """Return whether code is run by IPython, which notebooks and several editors use."""
    return _shell() is not None


def _shell() -> object:
    """Return the shell of IPython that runs code in this process; None if there is none."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_ipython() if callable(get_ipython) else None
