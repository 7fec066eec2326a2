"""From a fork of the warm server to a command as its shell would have started it.

The command has the arguments, environment, working folder, files, signals and standard streams of
its client. It is the leader of a session of its own, without a controlling terminal: the client
stays in the session of the shell, and passes signals on.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class CommandRequest:
    """A command as its client has asked for it."""

    message: dict[str, Any]
    """What `launcher.warm.client` sends."""

    descriptors: list[int]
    """The working folder, followed by the files that `message["numbers"]` numbers."""


def become(request: CommandRequest, additions: Mapping[str, str]) -> list[str]:
    """Turn this process, a fork of the server, into the command of a request.

    Args:
        request: The request.
        additions: Environment variables that the imported packages have set.

    Returns:
        The arguments of the command.
    """
    message = request.message
    os.fchdir(request.descriptors[0])
    os.close(request.descriptors[0])
    _place_files(request.descriptors[1:], message["numbers"])
    os.umask(message["umask"])
    os.environ.clear()
    os.environ.update({**additions, **message["environment"]})
    time.tzset()
    sys.argv[:] = message["argv"]
    sys.orig_argv[:] = message["orig_argv"]
    sys.path[:] = message["path"]
    importlib.invalidate_caches()
    tempfile.tempdir = None  # the name that was found in the server's environment
    multiprocessing.process.ORIGINAL_DIR = message["folder"]  # type: ignore[attr-defined]
    multiprocessing.current_process().authkey = os.urandom(32)
    _open_streams(message["streams"])
    _seed()
    _reset_signals(message["ignored"], message["blocked"])
    return list(message["arguments"])


def end_with_parent(parent: int) -> None:
    """Ask this process to stop when its parent ends, however that ends.

    Args:
        parent: Process id of the parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before prctl took effect
        os._exit(128 + signal.SIGTERM)


def _place_files(descriptors: list[int], numbers: list[int]) -> None:
    """Give files the numbers that they have in the client, for programs that this process runs."""
    above = max([*numbers, *descriptors]) + 1
    moved = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, above) for each in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(moved, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _open_streams(settings: list[dict[str, Any]]) -> None:
    """Let the standard streams encode as those of the client; their files have been replaced.

    The objects stay the same, because handlers of loggers hold them.
    """
    for stream, values in zip((sys.stdin, sys.stdout, sys.stderr), settings, strict=True):
        with contextlib.suppress(AttributeError, OSError, LookupError):
            stream.reconfigure(**values)  # type: ignore[union-attr]


def _seed() -> None:
    """Give numpy's global generator a state of its own; Python seeds its own after a fork."""
    if (random := sys.modules.get("numpy.random")) is not None:
        random.seed()


def _reset_signals(ignored: list[int], blocked: list[int]) -> None:
    """Handle signals as a new interpreter whose parent ignores and blocks some of them."""
    signal.set_wakeup_fd(-1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    by_python = {signal.SIGPIPE, signal.SIGXFSZ}
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        is_ignored = number in ignored or number in by_python
        with contextlib.suppress(OSError, ValueError):  # the C library uses two itself
            signal.signal(number, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
