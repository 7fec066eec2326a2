"""The terminal of a command, also of one that a warm server has forked.

Such a command has no controlling terminal, because it is in a session of its own. Its client, which
is in the session of the shell, names the terminal in the environment.
"""

from __future__ import annotations

import os
from pathlib import Path

TERMINAL_VARIABLE = "LAUNCHER_TERMINAL"
"""Environment variable of a forked command: its client's process id, a colon, and the terminal."""

_OWN = "/dev/tty"


def terminal_path() -> str:
    """Return the path under which this process can open its terminal."""
    _, _, path = os.environ.get(TERMINAL_VARIABLE, "").partition(":")
    return path or _OWN


def is_in_foreground() -> bool:
    """Return whether there is a terminal, and this command is not in its background."""
    client, _, path = os.environ.get(TERMINAL_VARIABLE, "").partition(":")
    if path and client.isdigit():
        return _is_foreground_process(int(client))
    try:
        descriptor = os.open(_OWN, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is_foreground_process(pid: int) -> bool:
    """Return whether another process is in the foreground of its terminal (proc(5): tpgid)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    fields = text.rpartition(") ")[2].split()
    return fields[2] == fields[5]
