"""Run a command in this process as a user would, and judge how it ended.

A command passes if it ends with a documented exit code and at most one error, shows no traceback,
writes nothing outside the working folder, sends no control character to the terminal, and uses
little processor time. Each of these is checked after every command.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cli import group, run_command
from launcher.errors import UsageError
from launcher.forking import suspect_all_threads

EXIT_CODES = {0, 1, 2, 75, 130}
"""Exit codes that commands may end with."""

MAX_CPU_SECONDS = 5
"""Processor time after which a command counts as hanging."""

MAX_SECONDS = 20
"""Seconds after which a command that waits counts as hanging. The machine may be busy."""

MAX_OUTPUT = 200_000
"""Characters of output after which a command counts as printing what it was given."""

_COMMANDING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, changes of writing direction and surrogates."""

_ERRORS = re.compile(r"^(launcher: |Error: )", re.MULTILINE)


class HangError(BaseException):
    """A command did not end in time."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str


class _WriteMonitor:
    """Prevents writes of this process outside a folder, as if all else were read-only."""

    def __init__(self) -> None:
        self._folder: str | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._observe)

    @contextlib.contextmanager
    def watching(self, folder: Path) -> Iterator[list[str]]:
        """Yield the list of attempts to write outside `folder` during the context."""
        self._folder, self.outside = os.path.realpath(folder), []
        try:
            yield self.outside
        finally:
            self._folder = None

    def _observe(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._folder is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            paths = [path] if writes or (mode and mode[0] in "wax") else []
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"):
            paths = [arguments[0]]
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = list(arguments[:2]) if event == "os.rename" else [arguments[1]]
        else:
            return
        for path in paths:
            if isinstance(path, (str, bytes)):
                self._judge(event, os.fsdecode(path))

    def _judge(self, event: str, path: str) -> None:
        assert self._folder is not None
        place = os.path.realpath(os.path.dirname(os.path.abspath(path)))  # noqa: PTH120, PTH100
        inside = place == self._folder or place.startswith(f"{self._folder}{os.sep}")
        if inside or place.startswith(("/dev/shm", "/proc")) or "__pycache__" in place:
            return
        if place == "/dev" and os.path.exists(path):  # noqa: PTH110
            return
        self.outside.append(f"{event} {path}")
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)


_MONITOR = _WriteMonitor()


def invoke(arguments: list[str], folder: Path) -> Ended:
    """Run `launcher ARGUMENTS` in this process and check how it ended.

    Args:
        arguments: The arguments, as Python decodes them from the command line.
        folder: The working folder, and the only place that may be written.
    """
    if "torch" in sys.modules:  # of another test, whose threads would not survive a fork
        suspect_all_threads()
    stdout, stderr = _stream(), _stream()
    with (
        _working_in(folder),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        _limited(),
        _MONITOR.watching(folder) as outside,
    ):
        code = run_command(group, arguments, "launcher")
    ended = Ended(code, _text(stdout), _text(stderr))
    judge(ended, outside)
    return ended


def judge(ended: Ended, outside: list[str]) -> None:
    """Fail if a command ended in a way that no command may end in."""
    output = ended.stdout + ended.stderr
    assert ended.exit_code in EXIT_CODES, ended
    assert "Traceback (most recent call last)" not in output, output
    assert len(_ERRORS.findall(ended.stderr)) <= 1, ended.stderr
    assert ended.exit_code != 2 or ended.stderr.strip(), "a refusal without a reason"
    assert not _COMMANDING.search(output), repr(output)
    assert len(output) <= MAX_OUTPUT, len(output)
    assert not outside, outside


def call(function: Callable[[], object], folder: Path) -> UsageError | None:
    """Call a function that reads a user's input; return the error that it raised on purpose."""
    with _working_in(folder), _limited(), _MONITOR.watching(folder) as outside:
        try:
            function()
        except UsageError as error:
            refusal: UsageError | None = error
        else:
            refusal = None
    assert not outside, outside
    assert len(str(refusal)) <= MAX_OUTPUT
    return refusal


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    content = stream.buffer
    assert isinstance(content, io.BytesIO)
    return content.getvalue().decode()


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Work in `folder`, with temporary files below it, and restore the process afterwards."""
    previous, temporary, path = Path.cwd(), tempfile.tempdir, list(sys.path)
    cache = os.environ.get("XDG_CACHE_HOME")
    os.chdir(folder)
    tempfile.tempdir = os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        os.environ.update({} if cache is None else {"XDG_CACHE_HOME": cache})
        tempfile.tempdir = temporary
        sys.path[:] = path
        os.chdir(previous)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise `HangError` in a command that takes too long, and restore its signal handlers."""

    def stop(*_: object) -> None:
        raise HangError

    signals = signal.SIGPROF, signal.SIGALRM, signal.SIGINT, signal.SIGTERM
    handlers = {number: signal.getsignal(number) for number in signals}
    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
