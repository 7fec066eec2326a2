"""The store of the launchers: its calls end although nobody answers."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import psutil
import pytest
from meeting_launchers import listens
from support import wait_until

from launcher.engine.ranks.launcher_store import (
    LauncherStore,
    StoreLostError,
    connect_store,
    open_store,
)
from launcher.engine.ranks.store_process import StoreProcess


def test_a_value_is_set_once() -> None:
    """Both ends see the same values, the first of those that may be set once, and sums."""
    here = open_store(0, seconds=20, timeout=20)
    there = LauncherStore(connect_store("127.0.0.1", here.port, 20), seconds=20)
    there.set("a", "1")
    for store in (here, there):
        store.set_once("b", "2" if store is here else "3")
        store.add("c", 4)
    assert [here.get(key) for key in "abc"] == [b"1", b"2", b"8"]
    assert [there.check([key]) for key in "ad"] == [True, False]
    assert there.add("c", 1) == 9
    here.close()
    with pytest.raises(RuntimeError):
        there.get("a")


def test_a_store_that_does_not_answer_is_lost() -> None:
    """A connection to a process that stands still ends after the given time."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(StoreLostError):
        connect_store("127.0.0.1", silent.getsockname()[1], 0.2)


def test_a_store_is_served_by_a_process_of_its_own() -> None:
    """A process that opens a store has no thread of torch, whose locks a fork would copy."""
    threads = _threads()
    store = open_store(0, seconds=20, timeout=20)
    wait_until(lambda: _threads() <= threads)  # that of a call may still be ending
    (server,) = _servers()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(server.pid, number)  # as they reach all processes of a job
    store.set("a", "1")
    assert store.get("a") == b"1"
    store.close()
    assert not psutil.pid_exists(server.pid)
    store.close()


def test_a_forked_process_does_not_end_the_store() -> None:
    """A rank that is forked later leaves the store to the launcher."""
    store = open_store(0, seconds=20, timeout=20)
    child = os.fork()
    if child == 0:
        store.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert store.add("a", 1) == 1
    store.close()


def test_a_store_ends_with_its_launcher() -> None:
    """The kernel ends the process that serves the store when its parent is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _store = StoreProcess()
        os.write(writer, str(_servers()[0].pid).encode())
        signal.pause()
    server = psutil.Process(int(os.read(reader, 100)))
    os.close(reader)
    os.close(writer)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    psutil.wait_procs([server], timeout=30)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


def test_a_port_that_is_taken_is_refused() -> None:
    """The error of torch names the port; no process remains."""
    children = set(psutil.Process().children())
    with (
        socket.create_server(("", 0)) as other,
        pytest.raises(RuntimeError, match="EADDRINUSE"),
    ):
        StoreProcess(other.getsockname()[1])
    assert set(psutil.Process().children()) == children


def _threads() -> set[str]:
    return {path.name for path in Path("/proc/self/task").iterdir()}


def _servers() -> list[psutil.Process]:
    """Return the children of this process that listen on a port."""
    return [child for child in psutil.Process().children() if listens(child.pid)]
