"""Signals that ask a run to stop: recorded at once, and acted upon where nothing is lost.

Schedulers send such a signal before the end of a job, terminals when they close, and people with
Ctrl-C. The ranks then agree on a step at which to stop, save a checkpoint and end with the exit
code `EXIT_RESUMABLE`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""The signals that ask a run to stop, besides SIGINT, which a person may send repeatedly."""

SECONDS_TO_BE_ENDED = 15.0
"""How long a process that finds what the first one of its machine finds as well waits to be ended.

The first one reports it, and its launcher ends the others, which may take long on a busy machine.
"""

EXIT_BY_SIGNAL = 128
"""A process that a signal ends exits with this plus the signal's number, as shells report it."""

_ENDING = (signal.SIGTERM, signal.SIGHUP)
"""The signals that end a rank at once while it waits for others with nothing to save."""

_Function = Callable[[int, FrameType | None], object]
_Handler = _Function | int | None

_cleanups: list[Callable[[], object]] = []


def call_before_end(cleanup: Callable[[], object]) -> None:
    """Let `end_process` call a function, which may run inside a signal handler."""
    _cleanups.append(cleanup)


def end_process(exit_code: int) -> NoReturn:
    """End this process without an exception, which code that imports could catch.

    Nothing but the functions of `call_before_end` runs before.
    """
    try:
        for cleanup in _cleanups:
            cleanup()
    finally:
        os._exit(exit_code)


def exit_process(exit_code: int) -> NoReturn:
    """Raise SystemExit, and let no signal that arrives from now on change the exit code.

    Python waits for threads and calls the functions of `atexit`. The process then ends, without the
    destruction of modules: with torch it takes most of a second, in which Python handles no signal,
    so that the warning of a scheduler would kill a command that has finished.
    """
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (signal.SIGINT, *STOP_SIGNALS):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: end_process(exit_code))

    def end() -> None:
        try:
            atexit.unregister(end)
            atexit._run_exitfuncs()  # noqa: SLF001  # those that were registered before
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
        finally:
            os._exit(exit_code)

    atexit.register(end)
    sys.exit(exit_code)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the signals that ask to stop; processes started in this context inherit the mask.

    `StopRequest.listen` unblocks them.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *STOP_SIGNALS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """Restore the handlers and the mask of the stop signals at the end of the context.

    The handler of SIGQUIT, which PyTorch's elastic agent replaces, is restored as well, and the
    descriptor to which Python writes the numbers of signals.
    """
    numbers = (signal.SIGINT, signal.SIGQUIT, *STOP_SIGNALS)
    handlers = {number: signal.getsignal(number) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            if handler is not None:  # None: the handler was not installed from Python
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _OwnHandler:
    """A handler of this package, with the handler that was there before."""

    def __init__(self, handler: _Function, before: _Handler) -> None:
        self._handler, self.before = handler, before

    def __call__(self, number: int, frame: FrameType | None) -> object:
        return self._handler(number, frame)


def install(number: signal.Signals, handler: _Function) -> None:
    """Install a handler for this process alone; a process that it forks can be ended by SIGTERM.

    `multiprocessing` ends processes with SIGTERM. A handler that only records the signal would keep
    a process that a recipe forks alive. Other signals often reach all processes of a job, whose
    rank decides when to stop, so forked processes keep those handlers.
    """
    before = signal.getsignal(number)
    if isinstance(before, _OwnHandler):
        before = before.before
    signal.signal(number, _OwnHandler(handler, before))
    _separate_forked_processes()


class StopRequest:
    """A recorder of the first signal that asks this process to stop.

    SIGINT raises KeyboardInterrupt until `defer` is called; then the first SIGINT is recorded like
    the other signals, and the second ends the process.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        """The first signal that arrived; None if none has."""

        self._defers = False
        self._num_interrupts = 0
        self._ends_at_once = False
        self._received: set[int] = set()
        self._pipe: tuple[int, int] | None = None
        """The pipe to which Python writes the number of every signal at its arrival."""

    def listen(self, *, interrupts: bool = True) -> None:
        """Install the handlers.

        Args:
            interrupts: Whether this process handles SIGINT; otherwise it ignores it, because its
                launcher does.
        """
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
                install(number, self._record)
        signal.signal(signal.SIGINT, self._interrupt if interrupts else signal.SIG_IGN)
        if self._pipe is None:
            self._pipe = os.pipe()
            weakref.finalize(self, _close, self._pipe)
            for end in self._pipe:
                os.set_blocking(end, False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def has_received(self, number: signal.Signals) -> bool:
        """Return whether a signal has arrived; any one thread beside the main thread may ask.

        Python runs handlers in the main thread, between two instructions. While that thread is in a
        call that does not return, such as one of NCCL whose peer has died, no handler runs.
        """
        if self._pipe is not None:
            with contextlib.suppress(BlockingIOError):
                self._received.update(os.read(self._pipe[0], 4096))
        return number in self._received or self.number == number

    def defer(self) -> None:
        """Record the first SIGINT from now on, instead of raising KeyboardInterrupt."""
        self._defers = True

    @contextlib.contextmanager
    def ends_at_once(self) -> Iterator[None]:
        """Let SIGTERM and SIGHUP end this process at once in this context: it has nothing to save.

        A signal that was recorded before ends it immediately.
        """
        self._ends_at_once = True
        if self.number in _ENDING:
            _end(self.number)
        try:
            yield
        finally:
            self._ends_at_once = False

    def wait_to_be_ended(self, seconds: float) -> None:
        """Wait up to `seconds` for the launcher to end this process with SIGTERM.

        If SIGTERM has already been recorded, the process ends now.
        """
        exit_code = EXIT_BY_SIGNAL + signal.SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: end_process(exit_code))
        if self.number is signal.SIGTERM:
            end_process(exit_code)
        time.sleep(seconds)

    def _record(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or signal.Signals(number)
        if self._ends_at_once and number in _ENDING:
            _end(self.number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._num_interrupts += 1
        if not self._defers:
            raise KeyboardInterrupt
        if self._num_interrupts > 1:
            _end(signal.SIGINT)
        self._record(number, frame)


@functools.cache
def _separate_forked_processes() -> None:
    """Let processes that this one forks treat their signals as their own.

    They share the pipe of this process, which would take the signals of a child for its own, such
    as the SIGTERM with which `multiprocessing` ends the processes of a pool.
    """
    masks: dict[int, set[int]] = {}

    def before() -> None:
        # A signal to the child waits until the child has its own handlers and no pipe.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *STOP_SIGNALS})
        masks[threading.get_ident()] = mask

    def after_in_parent() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop(threading.get_ident(), ()))

    def after_in_child() -> None:
        signal.set_wakeup_fd(-1)
        handler = signal.getsignal(signal.SIGTERM)
        if isinstance(handler, _OwnHandler):
            earlier = handler.before
            signal.signal(signal.SIGTERM, signal.SIG_DFL if earlier is None else earlier)
        after_in_parent()

    os.register_at_fork(
        before=before, after_in_parent=after_in_parent, after_in_child=after_in_child
    )


def _close(descriptors: tuple[int, int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def announce_stop(number: signal.Signals) -> int:
    """Print which signal ended the run; return the exit code of a process that it ends."""
    announce(f"stopped by {number.name}")
    return EXIT_BY_SIGNAL + number


def announce(text: str) -> None:
    """Print a line about a signal on standard error, from a handler, if it can be written."""
    with contextlib.suppress(OSError):  # the terminal may have closed
        os.write(2, f"\nlauncher: {text}\n".encode())


def _end(number: signal.Signals) -> NoReturn:
    end_process(announce_stop(number))
