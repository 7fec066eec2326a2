"""A run on several hosts from one command: ssh starts a launcher on each of them."""

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

from launcher.environment.nodes import (
    Nodes,
    NodesRequest,
    nodes_environment,
    nodes_of_hosts,
)
from launcher.environment.program import own_program
from launcher.errors import EXIT_FAILED, UsageError
from launcher.json_file import encode_json
from launcher.launch.forwarded_variables import forwarded_variables
from launcher.signals import STOP_SIGNALS

_SECONDS_TO_END = 5.0
"""How long the other launchers have to end by themselves after one has failed."""

_SECONDS_BETWEEN_POLLS = 0.05
_EXIT_OF_SSH = 255
"""The exit code of ssh if ssh itself failed; it has printed why."""

_SSH = (
    *("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),
)
"""Batch mode: nobody could answer the prompts of several hosts. A lost host is noticed."""


def run_on_hosts(
    hosts: Sequence[str],
    arguments: Sequence[str],
    folder: Path,
    request: NodesRequest,
    *,
    ssh: str | None,
    variables: Mapping[str, str],
) -> int:
    """Run `launcher ARGUMENTS` on each host; return the exit code of the run.

    Their output appears here, and signals are passed to them. They get the variables of this
    environment that `forwarded_variables` chooses, and `variables`, and otherwise have that of the
    host. If one of them fails, the others are stopped, unless they restart without it.

    Args:
        hosts: The hosts as ssh takes them. The launchers connect to the first one.
        arguments: The command's arguments, without those that choose hosts.
        folder: The working folder, which has the same path on every host.
        request: What is asked for.
        ssh: The command that reaches a host; None is ssh in batch mode.
        variables: Further variables of the launchers. They may be secrets, so they are sent through
            the connection, and no list of processes shows them.

    Raises:
        UsageError: Two hosts have the same name, or ssh is not installed.
    """
    nodes = nodes_of_hosts(hosts, request)
    program = shlex.split(ssh) if ssh else list(_SSH)
    launchers: dict[int, tuple[str, subprocess.Popen[str]]] = {}
    signals = _Signals()
    try:
        for index, host in enumerate(hosts):
            command = [*program, host, _remote(nodes, index, folder, arguments)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, text=True, start_new_session=True
            )
            _send(process, encode_json(dict(variables)))
            signals.add(process)
            launchers[process.pid] = (host, process)
    except FileNotFoundError:
        raise UsageError(
            f"--hosts starts a launcher on each host with {program[0]}, which is not installed "
            "here. Install an ssh client, or give another command with --ssh."
        ) from None
    needed = nodes.min_count or nodes.count if request.restarts else len(hosts)
    return _wait(launchers, signals, needed)


class _Signals:
    """Forwards the signals of this process to the launchers on the hosts."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._sent: list[str] = []
        for number in (signal.SIGINT, *STOP_SIGNALS):
            if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
                signal.signal(number, self._forward)

    def add(self, process: subprocess.Popen[str]) -> None:
        """Forward signals to this process as well, including earlier ones."""
        self._processes.append(process)
        for name in self._sent:
            _send(process, name)

    def send(self, name: str) -> None:
        """Send the signal with this name to every launcher."""
        self._sent.append(name)
        for process in self._processes:
            _send(process, name)

    def _forward(self, number: int, _: FrameType | None) -> None:
        self.send(signal.Signals(number).name)


def _send(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError, ValueError):  # the process has ended
        process.stdin.write(f"{line}\n")
        process.stdin.flush()


def _wait(
    launchers: Mapping[int, tuple[str, subprocess.Popen[str]]], signals: _Signals, needed: int
) -> int:
    """Wait for all launchers; return the exit code of the run.

    It is that of the first launcher that failed. Where the run goes on without some, it is 0 if any
    launcher has seen the run finish, and otherwise that of the first in the order of the hosts that
    was not lost, which is the one that decides for all.

    Args:
        launchers: The launchers, by the ids of their processes here, in the order of the hosts.
        signals: What is sent to them.
        needed: Launchers without which the run does not go on, so that the others are stopped.
    """
    waiting, failed = set(launchers), list[int]()
    deadline = 0.0
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG if deadline else 0)
        if deadline and time.monotonic() > deadline:
            deadline = 0.0
            signals.send("SIGINT")  # a run saves a checkpoint if it has taken a step
        if pid not in waiting:
            time.sleep(_SECONDS_BETWEEN_POLLS if deadline else 0)
            continue
        waiting.remove(pid)
        host, process = launchers[pid]
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode == 0:
            continue
        if process.returncode in (_EXIT_OF_SSH, 126, 127) or process.returncode < 0:
            print(
                f"launcher: {host}: ssh exited with {process.returncode}, so no launcher is "
                f"running on that host. Does `ssh {host} {shlex.quote(sys.executable)} -V` work?",
                file=sys.stderr,
            )
        failed.append(_exit_code(process))
        if len(launchers) - len(failed) == needed - 1:
            deadline = time.monotonic() + _SECONDS_TO_END
    if needed == len(launchers):
        return failed[0] if failed else 0
    codes = [process.returncode for _, process in launchers.values()]
    return 0 if 0 in codes else next((code for code in codes if 0 < code < 126), EXIT_FAILED)


def _exit_code(process: subprocess.Popen[str]) -> int:
    """Return the exit code of a launcher; that of a run that failed if ssh did."""
    is_of_ssh = process.returncode in (_EXIT_OF_SSH, 126, 127) or process.returncode < 0
    return EXIT_FAILED if is_of_ssh else process.returncode


def _remote(nodes: Nodes, index: int, folder: Path, arguments: Sequence[str]) -> str:
    """Return the command line for the shell of one host."""
    values = forwarded_variables(os.environ, folder) | nodes_environment(nodes, index)
    variables = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    remote = [*own_program(), "--ssh-remote", str(folder), *arguments]
    return " ".join(["exec", "env", *variables, shlex.join(remote)])
