"""The process that serves the store at which launchers and ranks meet.

torch serves a `TCPStore` in a thread, which looks up the name of every peer. If a process forks in
that moment, the lock of the C library's resolver stays locked in the copy: a rank that is forked
then would wait forever at the first name that it looks up. The launcher forks ranks while those of
other nodes connect, so the store is served by a process that forks nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from torch._C._distributed_c10d import TCPStore

from launcher.engine.ranks.processes import die_with_parent
from launcher.signals import signals_blocked

_STANDARD_STREAMS = (0, 1, 2)


class StoreProcess:
    """A process that serves a `TCPStore` on all interfaces until it is closed or this one ends.

    Args:
        port: The port; 0 takes one that is free.

    Raises:
        RuntimeError: The port cannot be opened. The message is that of torch.
    """

    def __init__(self, port: int = 0) -> None:
        reader, writer = os.pipe()
        parent = os.getpid()
        with signals_blocked(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about threads
            child = os.fork()
            if child == 0:  # signals stay blocked in it
                _serve(port, writer, parent)
        os.close(writer)
        self.close: Callable[[], object] = weakref.finalize(self, _end, child, parent)
        """End the process; nothing happens the second time."""

        with os.fdopen(reader) as answers:
            answer = answers.read()
        if not answer.isdecimal():
            self.close()
            raise RuntimeError(answer or "the process that serves the store has ended")
        self.port = int(answer)
        """The port of the store."""


def _serve(port: int, answers: int, parent: int) -> NoReturn:
    """Open the store, write its port or an error, and serve the store until this process ends."""
    try:
        die_with_parent(parent)
        _keep_only(answers)
        try:
            # torch waits for the answer of its own thread, at an address that needs no resolver.
            store = TCPStore(
                "127.0.0.1",
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=60),
            )
        except RuntimeError as error:
            os.write(answers, str(error).encode())
        else:
            os.write(answers, str(store.port).encode())
            os.close(answers)
            while True:
                signal.pause()
    finally:
        os._exit(1)


def _keep_only(descriptor: int) -> None:
    """Close the files of the parent, whose peers wait for the end of a connection or a pipe."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in _STANDARD_STREAMS:
        os.dup2(null, stream)
    kept = {*_STANDARD_STREAMS, descriptor}
    for link in Path("/proc/self/fd").iterdir():  # there may be a thousand million numbers
        if int(link.name) not in kept:
            with contextlib.suppress(OSError):  # it was that of the listing
                os.close(int(link.name))


def _end(child: int, parent: int) -> None:
    if os.getpid() != parent:  # a copy of the object in a process that was forked later
        return
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
