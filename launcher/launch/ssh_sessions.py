"""The ssh session of each host of a run, and what another connection finds out about it.

A session can outlive the run. ssh does not notice by itself that a machine has been cut off, a
launcher may be stopped, and a process that a launcher has left behind can hold a session open.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Literal

from launcher.environment.program import own_program
from launcher.json_file import encode_json
from launcher.launch.ssh_remote import EXIT_ENDED, EXIT_STOPPED

LauncherState = Literal["running", "stopped", "ended", "unreachable"]
"""What is known of the launcher on a host."""

_SECONDS_TO_LOOK = 30.0
"""How long a connection may take to find out about a launcher."""

_STATES: dict[int, LauncherState] = {0: "running", EXIT_STOPPED: "stopped", EXIT_ENDED: "ended"}


class Session:
    """A launcher on a host, started by an ssh process that holds the session open.

    Args:
        program: The command that reaches a host.
        host: The host, as ssh takes it.
        command: Returns the command line that starts the launcher there, with the key by which the
            launcher can be found.
        variables: Variables of the launcher, which are sent through the connection.

    Raises:
        FileNotFoundError: The command that reaches a host is not installed.
    """

    def __init__(
        self,
        program: Sequence[str],
        host: str,
        command: Callable[[str], str],
        variables: dict[str, str],
    ) -> None:
        self.host, self._program, self._key = host, [*program, host], secrets.token_hex(8)
        self.process = subprocess.Popen(
            [*self._program, command(self._key)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.send(encode_json(variables))
        self.is_closed = False
        """Whether this process has ended the session."""

        self._state: LauncherState = "running"
        self._since, self._looks = 0.0, 0
        self._look: subprocess.Popen[bytes] | None = None
        self._look_began = 0.0

    @property
    def is_known_to_run(self) -> bool:
        """Whether nothing else has been found out about the launcher."""
        return self._state == "running"

    @property
    def is_looking(self) -> bool:
        """Whether something is being found out about the launcher."""
        return self._look is not None

    def send(self, line: str) -> None:
        """Send a line to the launcher's machine, if the session is open."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # the process has ended
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def look(self) -> None:
        """Start to find out about the launcher, unless that is being done."""
        if self._look is not None:
            return
        command = shlex.join(["exec", *own_program(), "--ssh-remote-state", self._key])
        self._look_began = time.monotonic()
        with contextlib.suppress(OSError):
            self._look = subprocess.Popen(
                [*self._program, command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def take_look(self) -> None:
        """Take what has been found out, if that is known by now."""
        look = self._look
        if look is None:
            return
        if look.poll() is None:
            if time.monotonic() < self._look_began + _SECONDS_TO_LOOK:
                return
            _kill(look)
        self._look = None
        state = _STATES.get(look.returncode, "unreachable")
        if state != self._state:
            self._state, self._since, self._looks = state, self._look_began, 0
        self._looks += 1

    def is_lost(self, seconds: float) -> bool:
        """Return whether two looks in a row have found no launcher that runs, for `seconds`."""
        is_certain = self._looks > 1 and time.monotonic() >= self._since + seconds
        return self._state != "running" and is_certain

    def close(self) -> str:
        """End the session; return why, as a sentence for the user."""
        self.is_closed = True
        _kill(self.process)
        if self._look is not None:
            _kill(self._look)
        seconds = time.monotonic() - self._since
        return {
            "unreachable": f"{self.host} has not answered for {seconds:.0f} s. A launcher that is "
            "still running there ends by itself.",
            "stopped": f"the launcher on {self.host} is stopped. When it continues, it ends.",
        }.get(self._state, f"the launcher on {self.host} has ended, but ssh has not.")


def _kill(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
