"""`breakpoint()` in a rank: pdb on the terminal of the run, for one process of a machine at a time.

The standard input of a rank leads nowhere, because a terminal can serve only one of several ranks.
The debugger therefore opens the terminal itself. While a process of this machine is in the debugger
it holds a lock; other processes wait with it before they use the terminal, and the watchdogs see by
it that the run stands still for a reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import pdb  # noqa: T100
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from torch.utils.data import get_worker_info

from launcher.environment.terminal import is_in_foreground, terminal_path
from launcher.runs.locks import try_lock

_LOCK = "debugger.lock"

_VARIABLE = "PYTHONBREAKPOINT"
"""What `breakpoint()` calls: 0 is nothing, and a name is another debugger."""


@dataclass(kw_only=True)
class _Place:
    """This process among those that share a terminal."""

    folder: Path
    """Folder of this machine for the lock."""

    rank: int
    report: Callable[[str], object]
    """Called with the line about a breakpoint that is passed; shows it to the user."""

    log: TextIO
    """The log of the rank."""

    opens_terminal: bool
    """Whether the debugger opens the terminal; otherwise it uses the standard streams."""

    holds: bool = False
    """Whether this process is in the debugger."""

    debugger: _RankPdb | None = None
    """The debugger once it has been used; it keeps the breakpoints that were set in it."""

    passed: set[str] = field(default_factory=set)
    """Breakpoints that this process has passed because there is no terminal."""

    @property
    def lock(self) -> Path:
        """The file that is locked by the process in the debugger."""
        return self.folder / _LOCK

    @property
    def name(self) -> str:
        """The name of this process, for its user."""
        worker = get_worker_info()
        return f"rank {self.rank}" + ("" if worker is None else f" worker {worker.id}")


_SET_TRACE = pdb.set_trace

_place: _Place | None = None
"""What `install` was called with, here or in the process that this one is forked from."""


def install(
    folder: Path,
    rank: int,
    *,
    report: Callable[[str], object],
    log: TextIO,
    opens_terminal: bool = True,
) -> None:
    """Let `breakpoint()` and `pdb.set_trace()` use the terminal of the run in this process.

    The hook of another debugger, such as that of an editor, stays.

    Args:
        folder: Folder that all ranks of this machine can write to, on a local disk.
        rank: This rank.
        report: Shows a line to the user.
        log: The log of this rank.
        opens_terminal: Whether the debugger opens the terminal, because the standard streams lead
            elsewhere.
    """
    global _place  # noqa: PLW0603  # Python's own hook is global to the process
    if sys.breakpointhook is not sys.__breakpointhook__:
        return
    _place = _Place(folder=folder, rank=rank, report=report, log=log, opens_terminal=opens_terminal)
    sys.breakpointhook = _on_breakpoint
    pdb.set_trace = _on_set_trace


def uninstall() -> None:
    """Undo what `install` did."""
    global _place  # noqa: PLW0603
    if _place is not None:
        _place = None
        sys.breakpointhook, pdb.set_trace = sys.__breakpointhook__, _SET_TRACE


def is_in_use() -> bool:
    """Return whether a process of this run on this machine is in the debugger."""
    if _place is None or not _place.lock.exists():
        return False
    try:
        descriptor = os.open(_place.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return try_lock(descriptor, fcntl.LOCK_SH) is False
    finally:
        os.close(descriptor)


def wait_for_others() -> None:
    """Wait until no other process of this run on this machine is in the debugger."""
    if _place is None or _place.holds or not _place.lock.exists():
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(_place.lock, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)


def _on_breakpoint(*arguments: Any, **keywords: Any) -> Any:
    choice = os.environ.get(_VARIABLE, "")
    if choice == "0":
        return None
    if choice not in ("", "pdb.set_trace"):
        with _held():
            return sys.__breakpointhook__(*arguments, **keywords)  # noqa: T100
    return _debug(sys._getframe(1))  # noqa: SLF001


def _on_set_trace(*_: Any, **__: Any) -> None:
    _debug(sys._getframe(1))  # noqa: SLF001


def _debug(frame: FrameType) -> None:
    """Stop at the next line of `frame`, or go on where there is no terminal."""
    assert _place is not None
    if _place.opens_terminal and not is_in_foreground():
        _pass(frame)
        return
    if _place.debugger is None:
        _place.debugger = _RankPdb(_place)
    _place.debugger.set_trace(frame)


def _pass(frame: FrameType) -> None:
    """Say once on this machine that the run goes on past a breakpoint."""
    assert _place is not None
    where = f"{frame.f_code.co_filename}, line {frame.f_lineno}"
    if where in _place.passed:
        return
    _place.passed.add(where)
    text = (
        f"launcher: {_place.name} went on past breakpoint() in {where}: this run has no terminal, "
        "or is in its background. `launcher run --debug` debugs one process where there is one.\n"
    )
    print(text, end="", file=_place.log, flush=True)
    mark = _place.folder / f"passed-{hashlib.sha256(where.encode()).hexdigest()[:16]}"
    with contextlib.suppress(OSError), mark.open("x"):
        _place.report(text)


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """Hold the lock of the terminal for the duration of the context."""
    assert _place is not None
    if _place.holds:
        yield
        return
    descriptor = os.open(_place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _place.holds = True
        yield
    finally:
        _place.holds = False
        os.close(descriptor)


class _RankPdb(pdb.Pdb):
    """pdb that takes the terminal whenever it asks for a command, and gives it back after.

    Args:
        place: This process.
    """

    def __init__(self, place: _Place) -> None:
        if place.opens_terminal:
            # pdb would handle Ctrl-C in place of the launcher.
            self._pending = io.StringIO()
            super().__init__(stdin=io.StringIO(), stdout=self._pending, nosigint=True)
            self.prompt = f"(Pdb {place.name}) "
        else:
            super().__init__(nosigint=True)
        self._place = place
        self._is_new = True

    def set_trace(self, frame: FrameType | None = None, **keywords: Any) -> None:
        self._is_new = True
        super().set_trace(frame, **keywords)

    def interaction(self, *arguments: Any, **keywords: Any) -> None:
        with _held(), self._terminal():
            if self._is_new and self._place.opens_terminal:
                print(
                    f"\nlauncher: {self._place.name} is in the debugger; the other ranks wait for "
                    "it. c continues, q ends the run.",
                    file=self.stdout,
                )
            self._is_new = False
            super().interaction(*arguments, **keywords)

    @contextlib.contextmanager
    def _terminal(self) -> Iterator[None]:
        """Use the terminal in this context; what pdb writes before is kept until then."""
        if not self._place.opens_terminal:
            yield
            return
        with (
            Path(terminal_path()).open(encoding="utf-8", errors="replace") as reader,
            Path(terminal_path()).open(
                "w", buffering=1, encoding="utf-8", errors="replace"
            ) as writer,
            contextlib.redirect_stdout(writer),
            contextlib.redirect_stderr(writer),
        ):
            writer.write(self._pending.getvalue())  # "--Return--", for example
            self.stdin, self.stdout = reader, writer
            try:
                yield
            finally:
                self._pending = io.StringIO()
                self.stdin, self.stdout = io.StringIO(), self._pending
