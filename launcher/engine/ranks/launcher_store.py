"""The store at which launchers and ranks meet, as the launchers use it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import TCPStore

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
        is_served_here: Whether this process serves the store. Its calls then take no thread.
    """

    def __init__(self, store: TCPStore, *, seconds: float, is_served_here: bool) -> None:
        self.store = store
        """The store itself, which ranks can be given."""

        self._seconds, self._is_served_here = seconds, is_served_here
        self._is_lost = False

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

    def give_up(self) -> None:
        """Let all further calls fail at once."""
        self._is_lost = True

    def _call(self, call: Callable[[], _Result]) -> _Result:
        if self._is_served_here:
            return call()
        if self._is_lost:
            raise StoreLostError
        try:
            return _in_thread(call, self._seconds)
        except StoreLostError:
            self._is_lost = True
            raise


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
