"""Where the output of a rank goes: to its log, and from rank 0 to the terminal as well."""

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
from launcher.engine.ranks import debugger
from launcher.printable import printable
from launcher.regular_file import open_to_append
from launcher.runs.job import OutputMode


class Log(io.TextIOWrapper):
    """A log file whose write errors, as on a full disk, do not stop the run.

    Text that cannot be written is lost; the first loss is reported. A log that cannot be opened
    loses everything. Characters that UTF-8 cannot encode are written as escapes.

    Args:
        path: The file, which is appended to.
        report: Called with the message about the first loss.
    """

    def __init__(self, path: Path, report: Callable[[str], object]) -> None:
        self._path, self._report, self._has_reported = path, report, False
        self._descriptors: tuple[int, ...] = ()
        try:
            file = open_to_append(path)
        except OSError as error:
            self._report_loss(error)
            file = io.BufferedWriter(io.FileIO(os.devnull, "ab"))
        super().__init__(file, encoding="utf-8", errors="backslashreplace", line_buffering=True)

    def redirect(self, *descriptors: int) -> None:
        """Send what is written to these descriptors to the log, until text is lost."""
        for descriptor in descriptors:
            os.dup2(self.fileno(), descriptor)
        self._descriptors = descriptors

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._report_loss(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._report_loss(error)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()

    def _report_loss(self, error: OSError) -> None:
        if self._has_reported:
            return
        self._has_reported = True
        if self._descriptors:  # what writes to them would fail
            with Path(os.devnull).open("ab") as nowhere:
                for descriptor in self._descriptors:
                    os.dup2(nowhere.fileno(), descriptor)
        self._report(
            f"launcher: cannot write the log {self._path}: {error.strerror}. The run continues "
            "without it.\n"
        )


class Terminal(io.TextIOBase):
    """A stream to the terminal that may close without stopping the run.

    When the terminal is closed, or a reader such as `head` has exited, text for it is dropped; the
    log still gets it.

    Args:
        stream: The stream of the process, on which text is shown.
        log: Log that gets the text as well; None for no log.
    """

    def __init__(self, stream: TextIO, log: TextIO | None = None) -> None:
        self._stream, self._log = stream, log
        self._shown: TextIO | None = stream

    def show_through(self, stream: TextIO | None) -> None:
        """Show further text on `stream`; None shows it on the original stream again."""
        if self._shown is not None:
            self._shown = stream or self._stream

    def write(self, text: str) -> int:
        if self._log is not None:
            self._log.write(text)
        self._attempt(lambda shown: _write_encodable(shown, text))
        return len(text)

    def flush(self) -> None:
        if self._log is not None:
            self._log.flush()
        self._attempt(lambda shown: shown.flush())

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """How characters that the encoding lacks are written; `input()` asks for it."""
        return self._stream.errors

    def _attempt(self, action: Callable[[TextIO], object]) -> None:
        if self._shown is None:
            return
        debugger.wait_for_others()  # whose text would be torn apart
        try:
            action(self._shown)
        except (OSError, ValueError):  # its reader has exited, or it was closed
            self._shown = None


@dataclass(frozen=True, kw_only=True)
class Output:
    """The streams that a rank writes to."""

    terminal: TextIO
    """The original standard output of the process."""

    errors: TextIO
    """The original standard error of the process."""

    log: TextIO
    """The log of the rank."""

    output_mode: OutputMode = "progress"
    """How the terminal shows the progress of the run."""

    has_bar: bool = True
    """Whether a terminal shows a bar; otherwise it shows lines, between which a debugger can ask
    for commands."""

    def progress(self, total_steps: int) -> Progress:
        """Return the display that shows the progress of a run of `total_steps` steps."""
        if self.output_mode == "json":
            return JSONProgress(total_steps, self.terminal)
        return TerminalProgress(
            total_steps, self.terminal, self.log, self.show_through, has_bar=self.has_bar
        )

    def show_through(self, stream: TextIO | None) -> None:
        """Send what Python code prints to the terminal through `stream`, above a live bar.

        None sends it to the terminal directly again.
        """
        for python_stream in (sys.stdout, sys.stderr):
            if isinstance(python_stream, Terminal):
                python_stream.show_through(stream)


def open_output(
    path: Path,
    *,
    own_terminal: bool,
    on_terminal: bool,
    output_mode: OutputMode = "progress",
    has_bar: bool = True,
) -> Output:
    """Send the output of this process to its log, and to the terminal if asked for.

    Args:
        path: The log, which is appended to.
        own_terminal: Whether launcher started this process, so that its file descriptors may be
            redirected: the output of native code, crashes included, then goes to the log.
        on_terminal: Whether the output of Python code goes to the terminal as well, which it does
            only in the mode `progress`.
        output_mode: What the terminal shows.
        has_bar: Whether a terminal shows a bar.
    """
    with contextlib.suppress(OSError):  # this node may not share rank 0's run folder
        path.parent.mkdir(parents=True, exist_ok=True)
    stdout, stderr = sys.stdout, sys.stderr
    if own_terminal:
        stdout, stderr = _duplicate(1), _duplicate(2)
    terminal, errors = cast("TextIO", Terminal(stdout)), cast("TextIO", Terminal(stderr))
    log = Log(path, lambda text: errors.write(printable(text)) and errors.flush())
    if own_terminal:
        log.redirect(1, 2)
    if on_terminal and output_mode == "progress":
        sys.stdout, sys.stderr = Terminal(stdout, log), Terminal(stderr, log)
    elif own_terminal:
        sys.stdout = sys.stderr = log
    if output_mode == "quiet":
        terminal = io.StringIO()
    return Output(
        terminal=terminal, errors=errors, log=log, output_mode=output_mode, has_bar=has_bar
    )


def _duplicate(descriptor: int) -> TextIO:
    """Return a stream to what a descriptor refers to now; it escapes what it cannot encode."""
    return os.fdopen(
        os.dup(descriptor), "w", encoding="utf-8", errors="backslashreplace", buffering=1
    )


def _write_encodable(stream: TextIO, text: str) -> None:
    """Write text, with escapes for the characters that the encoding of the stream lacks."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
