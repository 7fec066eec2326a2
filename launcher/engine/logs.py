"""Where a rank's output goes: its log file, and for rank 0 the terminal as well."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TextIO


class Tee(io.TextIOBase):
    """Writes to a terminal and to a log; to other code it looks like the terminal."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self._terminal, self._log = terminal, log

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._terminal.write(text)

    def flush(self) -> None:
        self._log.flush()
        self._terminal.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()

    def fileno(self) -> int:
        return self._terminal.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._terminal.encoding


def open_log(path: Path, *, own_terminal: bool, on_terminal: bool) -> TextIO:
    """Send this process's output to the log at `path`; return the log.

    Args:
        path: The log, appended to.
        own_terminal: Whether this process was started by us, so that its file descriptors may be
            redirected: what native code prints, crashes included, then goes to the log.
        on_terminal: Whether what Python prints goes to the terminal as well.
    """
    log = path.open("a", encoding="utf-8", buffering=1)
    stdout, stderr = sys.stdout, sys.stderr
    if own_terminal:
        stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if on_terminal:
        sys.stdout, sys.stderr = Tee(stdout, log), Tee(stderr, log)
    elif own_terminal:
        sys.stdout = sys.stderr = log
    return log
