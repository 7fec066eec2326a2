"""Messages between a command and a warm server: JSON with a length before it, and descriptors."""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

MAX_DESCRIPTORS = 250
"""Most descriptors in one message (unix(7): SCM_MAX_FD is 253)."""

_MAX_BYTES = 1 << 26
_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("3i")


class ConnectionLostError(Exception):
    """The other side has closed the connection, or sent something else than a message."""


def send_message(
    stream: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()
) -> None:
    """Send a message.

    Raises:
        OSError: The connection is broken, or the other side does not read.
    """
    data = json.dumps(message).encode()
    socket.send_fds(stream, [_LENGTH.pack(len(data))], descriptors)
    stream.sendall(data)


def receive_message(stream: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return the next message and the descriptors that came with it, which are closed on exec.

    Raises:
        ConnectionLostError: There is none.
        OSError: The connection is broken, or no message came in time.
    """
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, _, _ = stream.recvmsg(_LENGTH.size, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    try:
        length = _LENGTH.unpack(data + _exactly(stream, _LENGTH.size - len(data)))[0]
        if length > _MAX_BYTES:
            raise ConnectionLostError
        message = json.loads(_exactly(stream, length))
        if not isinstance(message, dict):
            raise ConnectionLostError
    except ValueError:
        raise ConnectionLostError from None
    return message, list(descriptors)


def user_of(stream: socket.socket) -> int:
    """Return the id of the user on the other side of a connection (unix(7): SO_PEERCRED)."""
    data = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(data)[1])


def is_own(stream: socket.socket) -> bool:
    """Return whether the process on the other side of a connection is of this user."""
    return user_of(stream) == os.geteuid()


def _exactly(stream: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        chunk = stream.recv(num_bytes - len(data))
        if not chunk:
            raise ConnectionLostError
        data += chunk
    return bytes(data)
