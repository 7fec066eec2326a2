"""The store of the launchers: its calls end although nobody answers."""

from __future__ import annotations

import socket

import pytest
from torch._C._distributed_c10d import TCPStore

from launcher.engine.ranks.launcher_store import LauncherStore, StoreLostError, connect_store


def test_a_value_is_set_once() -> None:
    """Both ends see the same values, the first of those that may be set once, and sums."""
    served = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    here = LauncherStore(served, seconds=20, is_served_here=True)
    connected = connect_store("127.0.0.1", served.port, 20)
    there = LauncherStore(connected, seconds=20, is_served_here=False)
    there.set("a", "1")
    for store in (here, there):
        store.set_once("b", "2" if store is here else "3")
        store.add("c", 4)
    assert [here.get(key) for key in "abc"] == [b"1", b"2", b"8"]
    assert [there.check([key]) for key in "ad"] == [True, False]
    assert there.add("c", 1) == 9


def test_a_store_that_does_not_answer_is_lost() -> None:
    """A connection to a process that stands still ends after the given time."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(StoreLostError):
        connect_store("127.0.0.1", silent.getsockname()[1], 0.2)
