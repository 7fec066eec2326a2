"""Where a rank's output goes: its log file, and for rank 0 the terminal as well."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

from launcher.console.progress import JSONProgress, Progress, TerminalProgress
from launcher.runs.job import OutputMode


class Log(io.TextIOWrapper):
    """A log file that may become impossible to write, on a full disk, which stops no run.

    What cannot be written is lost, and the first time that is told.

    Args:
        path: The file, appended to.
        tell: Is given what to say of it.
    """

    def __init__(self, path: Path, tell: Callable[[str], object]) -> None:
        super().__init__(path.open("ab"), encoding="utf-8", line_buffering=True)
        self._path, self._tell, self._is_told = path, tell, False

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()

    def _lose(self, error: OSError) -> None:
        if self._is_told:
            return
        self._is_told = True
        self._tell(
            f"launcher: cannot write the log {self._path}: {error.strerror}. The run goes on "
            "without it.\n"
        )


class Terminal(io.TextIOBase):
    """The stream that a process was given, which may go away, and a log that stays.

    A closed terminal or a reader that has had enough (`| head`) is no reason to stop training:
    what cannot be shown is dropped, and is in the log.

    Args:
        stream: What to show text on.
        log: Where to keep it as well; None keeps nothing.
    """

    def __init__(self, stream: TextIO, log: TextIO | None = None) -> None:
        self._stream, self._log = stream, log
        self._shown: TextIO | None = stream

    def show_through(self, stream: TextIO | None) -> None:
        """Show what comes on `stream` instead; None is the terminal again."""
        if self._shown is not None:
            self._shown = stream or self._stream

    def write(self, text: str) -> int:
        if self._log is not None:
            self._log.write(text)
        self._try(lambda shown: shown.write(text))
        return len(text)

    def flush(self) -> None:
        if self._log is not None:
            self._log.flush()
        self._try(lambda shown: shown.flush())

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def _try(self, action: Callable[[TextIO], object]) -> None:
        if self._shown is None:
            return
        try:
            action(self._shown)
        except (OSError, ValueError):  # it is gone, or was closed
            self._shown = None


@dataclass(frozen=True, kw_only=True)
class Output:
    """The places that a rank can write to."""

    terminal: TextIO
    """Standard output as the process was given it."""

    errors: TextIO
    """Standard error as the process was given it."""

    log: TextIO
    """The rank's log."""

    output_mode: OutputMode = "progress"
    """What is to be seen on the terminal of how far the run is."""

    def progress(self, total_steps: int) -> Progress:
        """Return what shows how far a run of so many steps is."""
        if self.output_mode == "json":
            return JSONProgress(total_steps, self.terminal)
        return TerminalProgress(total_steps, self.terminal, self.log, self.show_through)

    def show_through(self, stream: TextIO | None) -> None:
        """Have what Python code prints reach the terminal through `stream`, above a live bar."""
        for printed in (sys.stdout, sys.stderr):
            if isinstance(printed, Terminal):
                printed.show_through(stream)


def open_output(
    path: Path, *, own_terminal: bool, on_terminal: bool, output_mode: OutputMode = "progress"
) -> Output:
    """Send this process's output to the log at `path`, and to the terminal where asked.

    Args:
        path: The log, appended to.
        own_terminal: Whether this process was started by us, so that its file descriptors may be
            redirected: what native code prints, crashes included, then goes to the log.
        on_terminal: Whether what Python prints goes to the terminal as well.
        output_mode: What is to be seen there; only with `progress` what Python prints goes there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)  # on a node that does not share rank 0's folder
    stdout, stderr = sys.stdout, sys.stderr
    log = Log(path, lambda text: errors.write(text) and errors.flush())
    if own_terminal:
        stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if on_terminal and output_mode == "progress":
        sys.stdout, sys.stderr = Terminal(stdout, log), Terminal(stderr, log)
    elif own_terminal:
        sys.stdout = sys.stderr = log
    terminal, errors = cast("TextIO", Terminal(stdout)), cast("TextIO", Terminal(stderr))
    if output_mode == "quiet":
        terminal = io.StringIO()
    return Output(terminal=terminal, errors=errors, log=log, output_mode=output_mode)
