"""Signals that ask a run to stop: noted, and acted upon where nothing is lost by it.

Schedulers announce the end of a job with one of these, terminals that they close, and people press
Ctrl-C. The ranks agree on a step at which to stop, save a checkpoint and end with an exit code that
says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Besides SIGINT, which a person sends and may send again."""

EXIT_BY_SIGNAL = 128
"""A process that is stopped by a signal exits with this and its number, as in any shell."""

_ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Those that end a process which does not expect them, whoever sends them."""


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Hold back what asks to stop; processes that are started in this context begin so.

    `StopRequest.listen` has them hear again.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *STOP_SIGNALS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """Put back at the end what handles the signals that ask to stop."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *STOP_SIGNALS)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None was set by something else than Python
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class StopRequest:
    """Notes the signals that ask this process to stop.

    SIGINT ends it at once, as ever, until `defer` says that there is something to lose; and always
    the second time.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        """The first signal that came; None where none has."""

        self._defers = False
        self._interrupts = 0
        self._ends = False

    def listen(self, *, interrupts: bool = True) -> None:
        """Begin to note signals; without `interrupts` SIGINT is somebody else's to handle."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
                signal.signal(number, self._note)
        signal.signal(signal.SIGINT, self._interrupt if interrupts else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def defer(self) -> None:
        """From now on note the first SIGINT as well."""
        self._defers = True

    @contextlib.contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Let SIGTERM and SIGHUP end this process while it waits for others, with nothing to lose.

        One that has come before ends it now.
        """
        self._ends = True
        if self.number in _ENDING:
            _end(self.number)
        try:
            yield
        finally:
            self._ends = False

    def wait_to_be_ended(self, seconds: float) -> None:
        """Let SIGTERM end this process, which has nothing more to say: now, or within `seconds`."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.number is signal.SIGTERM:
            os._exit(EXIT_BY_SIGNAL + signal.SIGTERM)
        time.sleep(seconds)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or signal.Signals(number)
        if self._ends and number in _ENDING:
            _end(self.number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if not self._defers:
            raise KeyboardInterrupt
        if self._interrupts > 1:
            _end(signal.SIGINT)
        self._note(number, frame)


def _end(number: signal.Signals) -> NoReturn:
    """End this process, without an exception, which an import could swallow."""
    os.write(2, f"\nlauncher: stopped by {number.name}\n".encode())
    os._exit(EXIT_BY_SIGNAL + number)
