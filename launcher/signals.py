"""Signals that ask a run to stop: noted, and acted upon where nothing is lost by it.

Schedulers announce the end of a job with one of these, terminals that they close, and people press
Ctrl-C. The ranks agree on a step at which to stop, save a checkpoint and end with an exit code that
says so.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Besides SIGINT, which a person sends and may send again."""

EXIT_BY_SIGNAL = 128
"""A process that is stopped by a signal exits with this and its number, as in any shell."""


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

    def wait_to_be_ended(self, seconds: float) -> None:
        """Let SIGTERM end this process, which has nothing more to say: now, or within `seconds`."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.number is signal.SIGTERM:
            os._exit(EXIT_BY_SIGNAL + signal.SIGTERM)
        time.sleep(seconds)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or signal.Signals(number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if not self._defers:
            raise KeyboardInterrupt
        if self._interrupts > 1:
            os.write(2, b"\nlauncher: stopped by SIGINT\n")
            os._exit(EXIT_BY_SIGNAL + signal.SIGINT)
        self._note(number, frame)
