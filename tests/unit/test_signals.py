"""Stop signals are those of this process, not those of the processes that it starts."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import pytest

from launcher.launch.signal_handler import SignalHandler
from launcher.signals import StopRequest, handlers_restored


def test_a_signal_to_a_forked_process_is_not_taken_for_an_own_one() -> None:
    """SIGTERM to a process that a rank has forked leaves the rank's own request empty."""
    with handlers_restored():
        stop = StopRequest()
        stop.listen(interrupts=False)
        ready = multiprocessing.Event()
        child = os.fork()
        if child == 0:
            ready.set()
            time.sleep(10)
            os._exit(0)
        assert ready.wait(10)
        os.kill(child, signal.SIGTERM)
        time.sleep(0.2)
        received_from_child = stop.has_received(signal.SIGTERM)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not received_from_child
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.has_received(signal.SIGTERM)


def _handle(*_: object) -> None:
    """Handle a signal, as a program does that imports this package."""


@pytest.mark.parametrize("before", [signal.SIG_DFL, _handle])
def test_a_forked_process_has_the_earlier_handler_of_sigterm(
    before: signal.Handlers | Callable[..., None],
) -> None:
    """Two handlers in a row, as of a command and its rank, are both undone in a forked process."""
    with handlers_restored():
        signal.signal(signal.SIGTERM, before)
        SignalHandler()
        with handlers_restored():
            StopRequest().listen(interrupts=False)
        stop = StopRequest()
        stop.listen(interrupts=False)
        child = os.fork()
        if child == 0:
            os._exit(int(signal.getsignal(signal.SIGTERM) != before))
        assert os.waitpid(child, 0)[1] == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.number is signal.SIGTERM


def test_a_signal_right_after_the_fork_is_that_of_the_forked_process() -> None:
    """Of 60 processes that get SIGTERM at once, each ends by it, and the rank receives none."""
    with handlers_restored():
        stop = StopRequest()
        stop.listen(interrupts=False)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        for _ in range(60):
            child = os.fork()
            if child == 0:
                time.sleep(10)
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not stop.has_received(signal.SIGTERM)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


def test_a_handler_of_the_user_stays_in_a_forked_process() -> None:
    """A handler that a recipe installs after this package's is inherited as in any program."""

    def own(*_: object) -> None:
        pass

    with handlers_restored():
        StopRequest().listen(interrupts=False)
        signal.signal(signal.SIGTERM, own)
        child = os.fork()
        if child == 0:
            os._exit(int(signal.getsignal(signal.SIGTERM) is not own))
        assert os.waitpid(child, 0)[1] == 0


def test_other_stop_signals_do_not_end_a_forked_process() -> None:
    """A warning that Slurm sends to all processes leaves those that a recipe has forked alive."""
    with handlers_restored():
        StopRequest().listen(interrupts=False)
        child = os.fork()
        if child == 0:
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
                os.kill(os.getpid(), number)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_what_saves_nothing_ends_at_once(number: signal.Signals) -> None:
    """A signal to a command that does not train, such as predict, announces no later stop."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        SignalHandler(saves=False)
        os.kill(os.getpid(), number)
        time.sleep(10)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as output:
        assert output.read().strip() == f"launcher: stopped by {number.name}"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number


def test_an_interruption_that_an_import_swallows_is_raised_again() -> None:
    """Code that runs when Ctrl-C comes may catch everything; the run ends all the same."""
    with handlers_restored():
        handler = SignalHandler(exits=False)
        handler.raise_again()
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        assert handler.stopped_by == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            handler.raise_again()
