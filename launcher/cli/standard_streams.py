"""Standard streams that a daemon or a shell has left closed, or that cannot encode every text."""

from __future__ import annotations

import contextlib
import io
import os
import sys


def prepare_streams() -> None:
    """Open the standard streams that are closed, and let them escape what they cannot encode.

    Call this before anything else is opened.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # it was redirected while it was open
                stream.reconfigure(errors="backslashreplace")


def _open_closed_streams() -> None:
    """Open /dev/null for each standard stream that is closed.

    Otherwise the next files and pipes that the process opens get the descriptors 0, 1 and 2, and
    code that redirects output closes them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _open_as(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # Python sets a stream to None if its descriptor is closed
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123


def _open_as(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == number:
        os.set_inheritable(number, True)
        return
    os.dup2(opened, number)
    with contextlib.suppress(OSError):
        os.close(opened)
