"""Ctrl-C while a command is being imported ends it with one line, as at any later time.

This module imports nothing that is slow.
"""

import os
import signal
from typing import NoReturn

STOPPED = "launcher: stopped by Ctrl-C"
"""What a command prints when Ctrl-C ends it."""

_EXIT_CODE = 128 + signal.SIGINT


def end_when_interrupted() -> None:
    """Let Ctrl-C end this process at once, until `raise_when_interrupted` is called."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in the background
        signal.signal(signal.SIGINT, _end)


def raise_when_interrupted() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, if `end_when_interrupted` has changed that."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> NoReturn:
    try:
        os.write(2, f"\n{STOPPED}\n".encode())
    finally:
        os._exit(_EXIT_CODE)
