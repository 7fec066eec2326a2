"""Call a function that may never return, such as one that asks a driver, with a limit of time."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import msgspec

T = TypeVar("T")

_CHUNK = 1 << 16


def call_within(seconds: float, function: Callable[[], T], kind: type[T]) -> T | None:
    """Return what a function returns in a forked process; None if it takes too long or dies.

    The calling process stays free of threads and of the driver's state, so that it may fork later.

    Args:
        seconds: The longest time to wait.
        function: The function to call. It must not depend on threads of this process.
        kind: Type of the result, which msgspec must be able to encode as JSON.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about threads
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(reader)
            _write_all(writer, msgspec.json.encode(function()))
            os._exit(0)
        os._exit(1)
    os.close(writer)
    try:
        text = _read_until(reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        _end(child)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError:
        return None


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read_until(descriptor: int, deadline: float) -> bytes | None:
    """Return everything up to the end of a pipe; None if it does not end before the deadline."""
    chunks: list[bytes] = []
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([descriptor], [], [], remaining)[0]:
            return None
        chunk = os.read(descriptor, _CHUNK)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def _end(child: int) -> None:
    """Kill a child and collect it, unless the kernel keeps it in a call of a driver."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 1.0
    while os.waitpid(child, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
