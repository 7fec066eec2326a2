"""Stop signals are those of this process, not those of the processes that it starts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

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
