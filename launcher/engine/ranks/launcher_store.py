"""The store at which launchers and ranks meet, as the launchers use it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import TCPStore

from launcher.engine.ranks.store_process import StoreProcess

_Result = TypeVar("_Result")


class StoreLostError(RuntimeError):
    """The process that serves the store does not answer."""


class LauncherStore:
    """A `TCPStore` whose calls end although the process that serves it stands still.

    A call of `TCPStore` waits for as long as a stopped process stands still, and for a quarter of
    an hour for a machine that was cut off. Python handles no signals meanwhile. Here a thread waits
    for the answer, and is left behind if there is none.

    Args:
        store: The store.
        seconds: How long a call may take.
        server: The process that serves the store, if this one has started it. Calls then take no
            thread.
    """

    def __init__(
        self, store: TCPStore, *, seconds: float, server: StoreProcess | None = None
    ) -> None:
        self.store = store
        """The store itself, which ranks can be given."""

        self._seconds, self._server = seconds, server
        self._is_lost = False

    @property
    def port(self) -> int:
        """The port at which the store is served."""
        return int(self.store.port)

    def set(self, key: str, value: str) -> None:
        """Set the value of a key.

        Raises:
            RuntimeError: The store cannot be reached; the other methods raise it as well.
        """
        self._call(lambda: self.store.set(key, value))

    def get(self, key: str) -> bytes:
        """Return the value of a key, which the store has."""
        return bytes(self._call(lambda: self.store.get(key)))

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether the store has all of these keys."""
        return bool(self._call(lambda: self.store.check(list(keys))))

    def add(self, key: str, number: int) -> int:
        """Add to the number of a key, and return the sum."""
        return int(self._call(lambda: self.store.add(key, number)))

    def set_once(self, key: str, value: str) -> None:
        """Set the value of a key, unless it has one."""
        self._call(lambda: self.store.compare_set(key, "", value))

    def close(self) -> None:
        """End the process that serves the store, if this one has started it."""
        if self._server is not None:
            self._server.close()

    def give_up(self) -> None:
        """Let all further calls fail at once."""
        self._is_lost = True

    def _call(self, call: Callable[[], _Result]) -> _Result:
        if self._server is not None:
            return call()
        if self._is_lost:
            raise StoreLostError
        try:
            return _in_thread(call, self._seconds)
        except StoreLostError:
            self._is_lost = True
            raise


def open_store(port: int, *, seconds: float, timeout: float) -> LauncherStore:
    """Return a new store, which a process of this node serves until it is closed.

    Args:
        port: Its port; 0 takes one that is free.
        seconds: How long a call of the launcher may take.
        timeout: How many seconds calls of torch may wait for a key.

    Raises:
        RuntimeError: The port cannot be opened.
    """
    server = StoreProcess(port)
    try:
        store = connect_store("127.0.0.1", server.port, seconds)
    except RuntimeError:
        server.close()
        raise
    store.set_timeout(timedelta(seconds=timeout))
    return LauncherStore(store, seconds=seconds, server=server)


def connect_store(host: str, port: int, seconds: float) -> TCPStore:
    """Return the store that another process serves.

    Raises:
        RuntimeError: It does not answer in time.
    """
    timeout = timedelta(seconds=seconds)
    return _in_thread(lambda: TCPStore(host, port, is_master=False, timeout=timeout), seconds)


def _in_thread(call: Callable[[], _Result], seconds: float) -> _Result:
    """Return what a call returns, in a thread that is left behind after `seconds`.

    Raises:
        StoreLostError: The call has not returned.
    """
    results: list[_Result] = []
    errors: list[Exception] = []

    def answer() -> None:
        try:
            results.append(call())
        except Exception as error:  # noqa: BLE001  # raised in the thread that asked
            errors.append(error)

    thread = threading.Thread(target=answer, name="store", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise StoreLostError
    return results[0]
