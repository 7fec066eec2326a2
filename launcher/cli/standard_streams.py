"""The standard streams of a process, which some daemons and shells start with them closed."""

from __future__ import annotations

import contextlib
import os
import sys


def open_closed_streams() -> None:
    """Open /dev/null as each of standard input, output and error that is closed.

    Otherwise the next files and pipes that the process opens take the numbers 0, 1 and 2, and
    whatever redirects its output then closes them. Call this before anything else is opened.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _open_as(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # as the interpreter leaves a stream that it finds closed
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123


def _open_as(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == number:
        os.set_inheritable(number, True)
        return
    os.dup2(opened, number)
    with contextlib.suppress(OSError):
        os.close(opened)
