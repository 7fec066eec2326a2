"""A run on several hosts from one command: ssh starts a launcher on each of them."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import select
import shlex
import signal
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
from launcher.launch.forwarded_variables import forwarded_variables
from launcher.launch.ssh_sessions import Session
from launcher.signals import STOP_SIGNALS

_SECONDS_TO_END = 5.0
"""How long the other launchers have to end by themselves after one has failed."""

_SECONDS_TO_LOOK_FIRST = 6.0
"""How long the other launchers have to end, after one has ended, before they are looked at."""

_SECONDS_TO_LOOK_AGAIN = 3.0
"""Interval of the looks at a launcher that has been found not to run."""

_SECONDS_TO_TAKE_A_LOOK = 1.0
"""Interval at which a look that takes too long is noticed."""

_SECONDS_BETWEEN_LOOKS = 600.0
"""The longest interval of the looks, which grows while all launchers run."""

_PATIENCE_BEFORE_THE_END = 3
"""How many times as long a machine may stay without an answer while the run may still go on."""

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
    host. If one of them fails, the others are stopped, unless they restart without it. The session
    of a machine that is lost ends when the run is over, whatever ssh notices.

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
    sessions: list[Session] = []
    signals = _Signals(sessions)
    try:
        for index, host in enumerate(hosts):
            command = functools.partial(_remote, nodes, index, folder, arguments)
            signals.add(Session(program, host, command, dict(variables)))
    except FileNotFoundError:
        raise UsageError(
            f"--hosts starts a launcher on each host with {program[0]}, which is not installed "
            "here. Install an ssh client, or give another command with --ssh."
        ) from None
    needed = nodes.min_count or nodes.count if request.restarts else len(hosts)
    wait = _Wait(sessions, signals, needed, request.node_timeout or nodes.node_timeout)
    return wait.until_all_have_ended()


class _Signals:
    """Forwards the signals of this process to the launchers on the hosts.

    Args:
        sessions: The sessions; `add` adds to them.
    """

    def __init__(self, sessions: list[Session]) -> None:
        self._sessions = sessions
        self.sent: list[str] = []
        """The names of the signals that have been sent."""

        self._wakeup, wakeup = os.pipe()
        for end in (self._wakeup, wakeup):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # it ends `wait`
        for number in (signal.SIGINT, *STOP_SIGNALS):
            if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
                signal.signal(number, self._forward)

    def add(self, session: Session) -> None:
        """Forward signals to this session as well, including earlier ones."""
        self._sessions.append(session)
        for name in self.sent:
            session.send(name)

    def send(self, name: str) -> None:
        """Send the signal with this name to every launcher."""
        self.sent.append(name)
        for session in self._sessions:
            session.send(name)

    def wait(self, seconds: float | None) -> None:
        """Wait until a signal arrives or a child process ends, for `seconds` at most."""
        select.select([self._wakeup], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeup, 4096)

    def _forward(self, number: int, _: FrameType | None) -> None:
        self.send(signal.Signals(number).name)


class _Wait:
    """The wait for the launchers of a run.

    Once a launcher has ended or a signal was sent, the other sessions are looked at from time to
    time, because their launchers end soon after it or are lost. Those that are lost are closed when
    the run is over.

    Args:
        sessions: The sessions, in the order of the hosts.
        signals: What is sent to them.
        needed: Launchers without which the run does not go on, so that the others are stopped.
        node_timeout: Seconds after which a machine that does not answer is lost.
    """

    def __init__(
        self, sessions: Sequence[Session], signals: _Signals, needed: int, node_timeout: float
    ) -> None:
        self._sessions, self._signals = sessions, signals
        self._needed, self._node_timeout = needed, node_timeout
        self._waiting, self._failed = list(sessions), list[int]()
        self._has_finished = False
        """Whether a launcher has ended with exit code 0."""

        self._stop_at = math.inf
        """When the launchers that are left are stopped, by the clock `time.monotonic`."""

        self._look_at, self._seconds_between_looks = math.inf, _SECONDS_TO_LOOK_FIRST

    def until_all_have_ended(self) -> int:
        """Wait for all launchers; return the exit code of the run.

        It is that of the first launcher that failed. Where the run goes on without some, it is 0 if
        any launcher has seen the run finish, and otherwise that of the first in the order of the
        hosts that was not lost, which is the one that decides for all.
        """
        while True:
            for session in [each for each in self._waiting if each.process.poll() is not None]:
                self._end(session)
            if not self._waiting:
                break
            now = time.monotonic()
            if now >= self._stop_at:
                self._stop_at = math.inf
                self._signals.send("SIGINT")  # a run saves a checkpoint if it has taken a step
            self._look(now)
            next_time = self._next_time(now)
            self._signals.wait(None if next_time == math.inf else max(next_time - now, 0))
        if self._needed == len(self._sessions):
            return self._failed[0] if self._failed else 0
        codes = [session.process.returncode for session in self._sessions]
        return 0 if 0 in codes else next((code for code in codes if 0 < code < 126), EXIT_FAILED)

    def _end(self, session: Session) -> None:
        """Take note that a session has ended."""
        self._waiting.remove(session)
        self._seconds_between_looks = _SECONDS_TO_LOOK_FIRST
        self._look_at = time.monotonic() + self._seconds_between_looks
        code = session.process.returncode
        if code == 0:
            self._has_finished = True
            return
        is_of_ssh = code in (_EXIT_OF_SSH, 126, 127) or code < 0
        if is_of_ssh and not session.is_closed:
            python = shlex.quote(sys.executable)
            _report(
                f"{session.host}: ssh exited with {code}, so no launcher is running on that host. "
                f"Does `ssh {session.host} {python} -V` work?"
            )
        self._failed.append(EXIT_FAILED if is_of_ssh else code)
        if len(self._sessions) - len(self._failed) == self._needed - 1:
            self._stop_at = time.monotonic() + _SECONDS_TO_END

    def _look(self, now: float) -> None:
        """Find out about the launchers that are left, and close sessions that are of no use."""
        for session in self._waiting:
            session.take_look()
        self._close_lost()
        if self._signals.sent and self._look_at == math.inf:
            self._look_at = now + self._seconds_between_looks
        if now < self._look_at:
            return
        for session in self._waiting:
            session.look()
        self._look_at = now + self._seconds_between_looks
        longer = self._seconds_between_looks * 2
        self._seconds_between_looks = min(longer, _SECONDS_BETWEEN_LOOKS)

    def _close_lost(self) -> None:
        """Close the sessions of lost launchers if the run is over."""
        is_over = self._has_finished or len(self._sessions) - len(self._failed) < self._needed
        patience = self._node_timeout * (1 if is_over else _PATIENCE_BEFORE_THE_END)
        lost = [each for each in self._waiting if each.is_lost(patience)]
        if is_over or len(lost) == len(self._waiting):
            for session in lost:
                _report(f"the run is over, and {session.close()}")

    def _next_time(self, now: float) -> float:
        """Return when something is due that no signal announces."""
        if any(session.is_looking for session in self._waiting):
            return min(self._stop_at, self._look_at, now + _SECONDS_TO_TAKE_A_LOOK)
        if all(session.is_known_to_run for session in self._waiting):
            return min(self._stop_at, self._look_at)
        self._look_at = min(self._look_at, now + _SECONDS_TO_LOOK_AGAIN)
        return min(self._stop_at, self._look_at)


def _report(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr, flush=True)


def _remote(nodes: Nodes, index: int, folder: Path, arguments: Sequence[str], key: str) -> str:
    """Return the command line for the shell of one host; `key` finds the launcher there."""
    values = forwarded_variables(os.environ, folder) | nodes_environment(nodes, index)
    variables = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    remote = [*own_program(), "--ssh-remote", key, str(folder), *arguments]
    return " ".join(["exec", "env", *variables, shlex.join(remote)])
