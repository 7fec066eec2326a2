"""Notebooks and interactive shells, told from programs that have arguments."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from launcher.environment.notebook import has_own_arguments


class _IPython(ModuleType):
    """What IPython leaves in sys.modules: `get_ipython` returns the running shell."""

    def __init__(self, shell: object) -> None:
        super().__init__("IPython")
        self.get_ipython = lambda: shell


@pytest.mark.parametrize(
    ("argv", "is_file", "shell", "own"),
    [
        (["mine.py", "epochs=1"], True, None, True),  # python mine.py
        (["-c", "epochs=1"], False, None, True),  # python -c
        ([""], False, None, True),  # python
        ([], False, None, True),
        (["/x/ipykernel_launcher.py", "-f", "k.json"], False, object(), False),  # a cell
        (["/x/ipykernel_launcher.py", "--f=k.json"], True, None, False),
        (["/x/colab_kernel_launcher.py", "-f", "k.json"], False, object(), False),
        (["/usr/bin/ipython", "--pylab"], False, object(), False),
        (["mine.py", "epochs=1"], True, object(), True),  # %run mine.py epochs=1
    ],
)
def test_arguments_of_a_kernel_are_not_the_user_s(
    argv: list[str],
    is_file: bool,
    shell: object,
    own: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Arguments belong to the user, except in the kernel of a notebook and at IPython's prompt."""
    main = ModuleType("__main__")
    if is_file:
        main.__file__ = argv[0]
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setitem(sys.modules, "IPython", _IPython(shell))
    monkeypatch.setattr(sys, "argv", argv)
    assert has_own_arguments() is own
