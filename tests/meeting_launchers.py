"""Runs on several nodes, each of which is a launcher on this machine."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from support import ROOT, Commands, read_lines, read_weights, wait_until

from launcher.runs.heartbeat import read_heartbeat
from launcher.runs.rundir import RunDir

PACED = f"{ROOT}/tests/recipes/worlds.py:paced"
SETTINGS = ("record_samples=true", "device=cpu")


class Launchers:
    """Launchers of one run on this machine; the first one that is started holds the meeting."""

    def __init__(
        self,
        run: Commands,
        port: int,
        *options: str,
        pause: float = 0.05,
        steps: int = 40,
        save_every: int = 5,
        recipe: str = PACED,
        before: Sequence[str] = (),
    ) -> None:
        self.run_dir = RunDir(run.folder / "out")
        self._run, self._before = run, before
        self._command = (
            *("launcher", "run", recipe, *SETTINGS, f"pause={pause}", f"steps={steps}", "-n", "1"),
            f"checkpoint_every={save_every}",
            *("--out", "out", "--rendezvous", f"localhost:{port}", *options),
        )
        self.processes: list[subprocess.Popen[str]] = []
        self.outputs: list[tuple[str, str]] = []

    def start(self, *options: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start one more launcher, with words before its command."""
        self.processes.append(self._run.start(*(before or self._before), *self._command, *options))
        return self.processes[-1]

    def start_in_order(self, count: int) -> None:
        """Start launchers, the first of which is to hold the meeting."""
        first = self.start()
        wait_until(lambda: listens(first.pid), first)
        for _ in range(count - 1):
            self.start()

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has taken a step."""
        wait_until(lambda: step_of(self.run_dir) >= step, self.processes[0])

    def wait_for_recoveries(self, number: int) -> None:
        """Wait until the run has gone on after so many losses."""
        wait_until(lambda: len(self.events("recovered")) >= number, self.processes[0])

    def launcher_of(self, rank: int) -> subprocess.Popen[str]:
        """Return the launcher that has started a rank."""
        parent = Path(f"/proc/{self.pid_of(rank)}/stat").read_text().rpartition(")")[2].split()[1]
        return next(each for each in self.processes if each.pid == int(parent))

    def pid_of(self, rank: int) -> int:
        """Return the process id of a rank."""
        heartbeat = read_heartbeat(self.run_dir, rank)
        assert heartbeat is not None
        return heartbeat.pid

    def finish(self) -> list[int]:
        """Wait for all launchers; return their exit codes."""
        self.outputs = [each.communicate(timeout=120) for each in self.processes]
        return [each.returncode for each in self.processes]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of one kind."""
        return [each for each in read_lines(self.run_dir.events) if each["event"] == name]


def listens(pid: int) -> bool:
    """Return whether a process, or one that it has started, listens on a TCP port."""
    pids = [pid, *(child.pid for child in psutil.Process(pid).children())]
    return any(_has_socket(each, "0A") for each in pids)


def has_peer(pid: int) -> bool:
    """Return whether a process has a TCP connection."""
    return _has_socket(pid, "01")


def _has_socket(pid: int, state: str) -> bool:
    """Return whether a process has a TCP socket in a state of the kernel's table."""
    table = "".join(Path(f"/proc/self/net/{name}").read_text() for name in ("tcp", "tcp6"))
    inodes = {line.split()[9] for line in table.splitlines() if line.split()[3] == state}
    with contextlib.suppress(OSError):  # it may end
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()).removeprefix("socket:[").removesuffix("]") in inodes:
                    return True
    return False


def step_of(run_dir: RunDir) -> int:
    steps = [row["step"] for row in read_lines(run_dir.metrics)] if run_dir.metrics.exists() else []
    return max(steps, default=0)


def check_equal(run_dir: RunDir, undisturbed: dict[str, Any]) -> None:
    """Fail unless a run has the final weights of the undisturbed one, to the bit."""
    weights = read_weights(run_dir.path)
    assert weights.keys() == undisturbed.keys()
    for name, weight in weights.items():
        assert weight.equal(undisturbed[name]), name


def train_undisturbed(run: Commands) -> RunDir:
    """Return the folder of a finished run on two nodes that nothing has disturbed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    both = Launchers(run, port, "--nodes", "2", pause=0)
    both.start_in_order(2)
    assert both.finish() == [0, 0], both.outputs
    return both.run_dir
