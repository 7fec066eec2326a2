"""The warm servers of this user: what they do, and their end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from dataclasses import dataclass
from typing import Any

from launcher.warm.messages import ConnectionLostError, is_own, receive_message, send_message
from launcher.warm.socket_folder import ForeignFolderError, SocketFolder, open_socket_folder

MAX_SERVERS = 3
"""Most servers of one user, each of another environment; the least used one ends for another."""

_SECONDS_TO_ANSWER = 5.0
_SECONDS_TO_END = 5.0


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A server that has answered."""

    pid: int
    prefix: str
    """The environment of Python that it has imported from."""

    started: float
    """When it started, in seconds since the epoch."""

    used: float
    """When it started the last command, or itself."""

    num_commands: int
    """Number of commands that run now."""

    idle_minutes: float
    """Minutes without a command after which it ends."""

    memory_bytes: int
    """Most memory that it has used."""


def find_servers() -> list[RunningServer]:
    """Return the servers of this user that answer.

    Raises:
        ForeignFolderError: Another user has made the folder of the sockets.
    """
    servers = []
    with contextlib.suppress(FileNotFoundError), open_socket_folder(makes=False) as folder:
        for name in folder.names():
            with contextlib.suppress(OSError, ConnectionLostError):
                reply = _ask(folder, name, "status")
                servers.append(
                    RunningServer(
                        pid=reply["pid"],
                        prefix=reply["prefix"],
                        started=reply["started"],
                        used=folder.last_used(name),
                        num_commands=reply["num_commands"],
                        idle_minutes=reply["idle_minutes"],
                        memory_bytes=reply["peak_kib"] * 1024,
                    )
                )
    return servers


def stop_servers() -> int:
    """End all servers of this user, whose commands go on; return how many there were.

    Raises:
        ForeignFolderError: Another user has made the folder of the sockets.
    """
    count = 0
    with contextlib.suppress(FileNotFoundError), open_socket_folder(makes=False) as folder:
        for name in folder.names():
            count += stop_server(folder, name)
            folder.remove(name)
    return count


def stop_server(folder: SocketFolder, name: str) -> bool:
    """End a server and wait for its end; return whether it ran."""
    try:
        pid = int(_ask(folder, name, "stop")["pid"])
        process = os.pidfd_open(pid)
    except (OSError, ConnectionLostError):
        return False
    try:
        if not select.select([process], [], [], _SECONDS_TO_END)[0]:
            signal.pidfd_send_signal(process, signal.SIGKILL)
    finally:
        os.close(process)
    return True


def stop_least_used(folder: SocketFolder) -> None:
    """End the servers that were not used for longest, until there is room for another one."""
    names = sorted(folder.names(), key=folder.last_used)
    for name in names[: max(len(names) - MAX_SERVERS + 1, 0)]:
        stop_server(folder, name)
        folder.remove(name)


def _ask(folder: SocketFolder, name: str, kind: str) -> dict[str, Any]:
    with folder.connect(name, _SECONDS_TO_ANSWER) as stream:
        if not is_own(stream):
            raise ForeignFolderError("another user's process listens on its socket")
        send_message(stream, {"kind": kind})
        return receive_message(stream)[0]
