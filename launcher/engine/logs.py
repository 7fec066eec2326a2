"""Where a rank's output goes: its log file, and for rank 0 the terminal as well."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO


class Tee(io.TextIOBase):
    """Writes to a terminal and to a log; to other code it looks like the terminal."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self._terminal, self._log = terminal, log
        self._shown: TextIO = terminal

    def show_through(self, stream: TextIO | None) -> None:
        """Write what is for the terminal to `stream`; None is the terminal again."""
        self._shown = self._terminal if stream is None else stream

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._shown.write(text)

    def flush(self) -> None:
        self._log.flush()
        self._shown.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()

    def fileno(self) -> int:
        return self._terminal.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._terminal.encoding


@dataclass(frozen=True, kw_only=True)
class Output:
    """The places that a rank can write to."""

    terminal: TextIO
    """Standard output as the process was given it."""

    errors: TextIO
    """Standard error as the process was given it."""

    log: TextIO
    """The rank's log."""

    def show_through(self, stream: TextIO | None) -> None:
        """Have what Python code prints reach the terminal through `stream`, above a live bar."""
        for tee in (sys.stdout, sys.stderr):
            if isinstance(tee, Tee):
                tee.show_through(stream)


def open_output(path: Path, *, own_terminal: bool, on_terminal: bool) -> Output:
    """Send this process's output to the log at `path`, and to the terminal where asked.

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
    return Output(terminal=stdout, errors=stderr, log=log)
