"""The warm server: a process that has imported torch, computes nothing, and forks commands.

For each connection it forks a handler, so that no client can hold it up. The handler compares the
client's surroundings with the server's, forks the command, waits for it and reports how it ended.
Commands therefore outlive the server: if it is killed, nothing but the next start notices.

A command ends with its client. If the client is killed, the handler sends SIGHUP to the command, as
a terminal does that closes; if the handler is killed, the kernel sends SIGTERM.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from launcher.forking import observed_threads, reason_not_to_fork
from launcher.warm.forked_command import CommandRequest, become, end_with_parent
from launcher.warm.messages import (
    ConnectionLostError,
    is_own,
    receive_message,
    send_message,
)
from launcher.warm.socket_folder import SocketFolder, open_socket_folder
from launcher.warm.surroundings import ImportedFiles, differing_limit, identity, limits

IDLE_MINUTES_VARIABLE = "LAUNCHER_WARM_MINUTES"
"""Environment variable: minutes without a command after which a server ends."""

DEFAULT_IDLE_MINUTES = 10.0
_MAX_IDLE_MINUTES = 7 * 24 * 60.0

_SECONDS_TO_ASK = 10.0
"""Longest wait of a handler for its client."""

_SECONDS_BETWEEN_CHECKS = 30.0
"""Interval at which a server looks whether its socket is still its own."""

_OTHER_REQUEST = 3
"""Exit code of a handler that has started no command; such a connection is no use of the server."""


@dataclass(kw_only=True)
class _State:
    """What a server knows, and its handlers with it."""

    name: str
    folder: SocketFolder
    listener: socket.socket
    inode: int
    wakeup: tuple[int, int]
    imported: ImportedFiles
    pid: int = field(default_factory=os.getpid)
    limits: dict[str, Any] = field(default_factory=limits)
    started: float = field(default_factory=time.time)
    handlers: set[int] = field(default_factory=set)
    """Process ids of the handlers."""

    ends: bool = False


def serve(name: str, ready: int, modules: Sequence[str], load: Callable[[], None]) -> list[str]:
    """Import what commands need, and fork a command for each request until the server is idle.

    Args:
        name: The identity of the server, from `surroundings.identity`.
        ready: A pipe that receives "ready", or why this server cannot serve.
        modules: Modules to import.
        load: Imports further modules.

    Returns:
        In a forked command: its arguments. The server itself and its handlers exit.
    """
    if identity() != name:
        _refuse(ready, "a new process differs from this one in its environment or limits")
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the working folder, whose modules no server may import
    imported = ImportedFiles()
    started = time.time_ns()
    environment = dict(os.environ)
    with observed_threads():
        for module in modules:
            importlib.import_module(module)
        load()
    imported.add_imported()
    problem = reason_not_to_fork()
    if problem is not None:
        _refuse(ready, f"importing torch {problem}")
    if imported.newest() > started or imported.changed():
        _refuse(ready, "files changed while the server imported them")
    additions = {key: value for key, value in os.environ.items() if key not in environment}
    gc.collect()
    gc.freeze()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(open_socket_folder())
        listener, inode = folder.listen(name)
        state = _State(
            name=name,
            folder=folder,
            listener=listener,
            inode=inode,
            wakeup=os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC),
            imported=imported,
        )
        _write(ready, "ready")
        request = _accept_until_idle(state)
        if request is None:
            folder.remove(name, inode)
            sys.exit(0)
    return become(request, additions)


def idle_minutes() -> float:
    """Return the minutes without a command after which a server ends."""
    try:
        minutes = float(os.environ.get(IDLE_MINUTES_VARIABLE, ""))
    except ValueError:
        return DEFAULT_IDLE_MINUTES
    return minutes if 0 < minutes <= _MAX_IDLE_MINUTES else DEFAULT_IDLE_MINUTES


def _accept_until_idle(state: _State) -> CommandRequest | None:
    """Fork a handler for each connection; return None when the server shall end.

    In a forked command, return its request.
    """
    patience = idle_minutes() * 60
    deadline = time.monotonic() + patience
    _install_handlers(state)
    state.listener.setblocking(False)
    poller = select.poll()
    for descriptor in (state.listener.fileno(), state.wakeup[0]):
        poller.register(descriptor, select.POLLIN)
    while not state.ends:
        remaining = max(deadline - time.monotonic(), 0) if not state.handlers else patience
        poller.poll(min(remaining, _SECONDS_BETWEEN_CHECKS) * 1000)
        with contextlib.suppress(BlockingIOError):
            os.read(state.wakeup[0], 4096)
        if _reap(state):
            deadline = time.monotonic() + patience
        with contextlib.suppress(OSError):
            connection, _ = state.listener.accept()
            request = _handle_in_fork(state, connection)
            if request is not None:
                return request
            continue
        is_idle = not state.handlers and time.monotonic() >= deadline
        if is_idle or state.folder.inode(state.name) != state.inode:
            return None
    return None


def _install_handlers(state: _State) -> None:
    def end(*_: object) -> None:
        state.ends = True

    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # so that the descriptor below is written
    signal.set_wakeup_fd(state.wakeup[1], warn_on_full_buffer=False)


def _reap(state: _State) -> bool:
    """Collect handlers that have ended; return whether one of them has run a command."""
    has_run = False
    while state.handlers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            break
        state.handlers.discard(pid)
        has_run |= os.waitstatus_to_exitcode(status) != _OTHER_REQUEST
    return has_run


def _handle_in_fork(state: _State, connection: socket.socket) -> CommandRequest | None:
    """Fork a handler of a connection; return the request in the command that it forks."""
    pid = _fork()
    if pid:
        state.handlers.add(pid)
        connection.close()
        return None
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor in state.wakeup:
        os.close(descriptor)
    state.listener.close()
    code = _OTHER_REQUEST
    try:
        connection.setblocking(True)
        connection.settimeout(_SECONDS_TO_ASK)
        request = _handle(state, connection)
        if request is not None:
            return request
        code = 0
    except (OSError, ConnectionLostError, _NoCommandError):
        pass  # the client is gone or has what it asked for
    except BaseException:  # noqa: BLE001  # it must not reach the server's own code
        sys.excepthook(*sys.exc_info())
    os._exit(code)


class _NoCommandError(Exception):
    """The client has asked for no command."""


def _handle(state: _State, connection: socket.socket) -> CommandRequest | None:
    """Answer a client; return the request in the command that it asks for, None in the handler."""
    if not is_own(connection):
        raise _NoCommandError
    message, descriptors = receive_message(connection)
    if message["kind"] == "status":
        send_message(connection, _status(state))
        raise _NoCommandError
    if message["kind"] == "stop":
        os.kill(state.pid, signal.SIGTERM)
        send_message(connection, {"pid": state.pid})
        raise _NoCommandError
    if problem := _problem(state, message):
        send_message(connection, problem)
        raise _NoCommandError
    send_message(connection, {"accepted": True})
    receive_message(connection)  # the client still waits: it may have given up in the meantime
    state.folder.touch(state.name)
    return _fork_command(connection, CommandRequest(message=message, descriptors=descriptors))


def _problem(state: _State, message: dict[str, Any]) -> dict[str, str]:
    """Return why this server cannot run a command as a new process would; empty if it can."""
    if changed := state.imported.changed():
        return {"stale": changed}
    if message["identity"] != state.name:
        return {"stale": "the environment"}
    if limit := differing_limit(message["limits"], state.limits):
        return {"limit": limit}
    return {}


def _status(state: _State) -> dict[str, Any]:
    return {
        "pid": state.pid,
        "started": state.started,
        "num_commands": len(state.handlers),
        "idle_minutes": idle_minutes(),
        "prefix": sys.prefix,
        "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def _fork_command(connection: socket.socket, request: CommandRequest) -> CommandRequest | None:
    """Fork a command and stay with it; return the request in the command, None after its end."""
    started, command_started = os.pipe()
    handler = os.getpid()
    pid = _fork()
    if pid == 0:
        os.close(started)
        connection.close()
        os.setsid()
        end_with_parent(handler)
        os.close(command_started)  # a command that fails before this is reported by its status
        return request
    os.close(command_started)
    for descriptor in request.descriptors:  # readers of a pipe wait for the end of all its writers
        os.close(descriptor)
    os.read(started, 1)
    os.close(started)
    _watch(connection, pid, request)
    return None


def _watch(connection: socket.socket, pid: int, request: CommandRequest) -> None:
    """Tell the client about its command until that has ended; end it if the client is gone."""
    process = os.pidfd_open(pid)
    is_gone = False
    try:
        send_message(connection, {"pid": pid}, [process])
    except OSError:
        is_gone = True
        _hang_up(pid, request)
    poller = select.poll()
    poller.register(process, select.POLLIN)
    if not is_gone:
        poller.register(connection, select.POLLIN)
    while not any(descriptor == process for descriptor, _ in poller.poll()):
        poller.unregister(connection)  # the client sends nothing more: it has closed its end
        _hang_up(pid, request)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        send_message(connection, {"status": status})


def _hang_up(pid: int, request: CommandRequest) -> None:
    """Ask a command whose client is gone to stop; it may have been stopped by Ctrl-Z."""
    is_ignored = int(signal.SIGHUP) in request.message["ignored"]
    number = signal.SIGTERM if is_ignored else signal.SIGHUP
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        os.killpg(pid, signal.SIGCONT)


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # OpenBLAS ends its threads before
        return os.fork()


def _write(pipe: int, text: str) -> None:
    with contextlib.suppress(OSError):  # the client that started this server is gone
        os.write(pipe, text.encode())
    os.close(pipe)


def _refuse(ready: int, reason: str) -> NoReturn:
    _write(ready, reason)
    sys.exit(1)
