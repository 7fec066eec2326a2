"""A run on several machines that is typed once: ssh starts a launcher on each."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from launcher.environment.nodes import Nodes, nodes_environment, nodes_of_hosts
from launcher.environment.program import own_program
from launcher.errors import EXIT_FAILED, UsageError
from launcher.signals import STOP_SIGNALS

_SECONDS_TO_HEAR = 5.0
"""In which the others have heard of a failure from the one that failed, and have ended."""

_SECONDS_BETWEEN_LOOKS = 0.05
_EXIT_OF_SSH = 255
"""Where ssh itself failed: it has said why."""

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20")
"""Without questions: nobody could answer those of several machines."""


def run_on_hosts(
    hosts: Sequence[str],
    arguments: Sequence[str],
    folder: Path,
    *,
    rendezvous: str | None,
    ssh: str | None,
) -> int:
    """Run `launcher ARGUMENTS` on each host; return the exit code of the run.

    What they print comes out here, and signals are passed on to them. When one of them ends badly,
    the others are asked to.

    Args:
        hosts: As ssh takes them. The launchers meet on the first.
        arguments: Of the command, without those that say where it runs.
        folder: Where, under the same name on each of them.
        rendezvous: HOST[:PORT] of the first, where the others know it by another name.
        ssh: The command to reach a host with.

    Raises:
        UsageError: They cannot be told apart, or ssh is not there.
    """
    nodes = nodes_of_hosts(hosts, rendezvous)
    program = shlex.split(ssh) if ssh else list(_SSH)
    started: dict[int, tuple[str, subprocess.Popen[str]]] = {}
    signals = _Signals()
    try:
        for index, host in enumerate(hosts):
            command = [*program, host, _remote(nodes, index, folder, arguments)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, text=True, start_new_session=True
            )
            signals.attend(process)
            started[process.pid] = (host, process)
    except FileNotFoundError:
        raise UsageError(
            f"--hosts starts a launcher on each of them with {program[0]}, which is not here. "
            "Install an ssh client, or name another with --ssh."
        ) from None
    return _wait(started, signals)


class _Signals:
    """Passes on the signals that this process gets."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._sent: list[str] = []
        for number in (signal.SIGINT, *STOP_SIGNALS):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
                signal.signal(number, self._note)

    def attend(self, process: subprocess.Popen[str]) -> None:
        """Pass them on to this one as well, those included that came."""
        self._processes.append(process)
        for name in self._sent:
            _send(process, name)

    def send(self, name: str) -> None:
        """Pass on a signal."""
        self._sent.append(name)
        for process in self._processes:
            _send(process, name)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.send(signal.Signals(number).name)


def _send(process: subprocess.Popen[str], name: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError, ValueError):  # it has ended
        process.stdin.write(f"{name}\n")
        process.stdin.flush()


def _wait(started: Mapping[int, tuple[str, subprocess.Popen[str]]], signals: _Signals) -> int:
    """Wait for all of them; return the exit code of the run: of the first that ended badly."""
    waiting = set(started)
    code, until = 0, 0.0
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG if until else 0)
        if until and time.monotonic() > until:
            until = 0.0
            signals.send("SIGINT")  # ends at once what has taken no step, and saves what has
        if pid not in waiting:
            time.sleep(_SECONDS_BETWEEN_LOOKS if until else 0)
            continue
        waiting.remove(pid)
        host, process = started[pid]
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode == 0:
            continue
        if process.returncode in (_EXIT_OF_SSH, 126, 127) or process.returncode < 0:
            print(
                f"launcher: {host}: ssh ended with {process.returncode}, and with it the launcher "
                f"there. Does `ssh {host} {shlex.quote(sys.executable)} -V` work?",
                file=sys.stderr,
            )
            process.returncode = EXIT_FAILED
        if not code:
            code = process.returncode
            until = time.monotonic() + _SECONDS_TO_HEAR
    return code


def _remote(nodes: Nodes, index: int, folder: Path, arguments: Sequence[str]) -> str:
    """Return the command of one host, as its shell takes it."""
    variables = [
        f"{name}={shlex.quote(value)}" for name, value in nodes_environment(nodes, index).items()
    ]
    remote = [*own_program(), "--ssh-remote", str(folder), *arguments]
    return " ".join(["exec", "env", *variables, shlex.join(remote)])
