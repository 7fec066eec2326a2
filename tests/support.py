"""Run the real commands in tests, and detect processes that they leave behind."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from warm import SCRIPTS, Warm

from launcher.runs.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MARK = "LAUNCHER_TEST_RUN"
"""Environment variable that marks the processes of one test."""

needs_fashion_mnist = pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(),
    reason="needs Debian's package dataset-fashion-mnist, which apt-get could not install",
)


_OTHER_LAUNCHERS = ("torchrun", "accelerate", "deepspeed")
"""Launchers whose ranks start warm if they themselves do."""

_SESSIONS: dict[str, set[int]] = {}
"""Session ids of the commands that were started under each mark."""


@functools.cache
def _warm(modules: tuple[str, ...]) -> Warm:
    """Return the server of this process that has these modules, started at the first call."""
    return Warm(Commands(Path(), "warm").environment(), modules)


@dataclass(frozen=True)
class Finished:
    """Exit code and output of a command that has ended."""

    exit_code: int
    """Exit code; minus the number of the signal that killed the command."""

    stdout: str
    """Standard output."""

    stderr: str
    """Standard error."""


@dataclass(frozen=True)
class Commands:
    """Runner of commands of this virtual environment in one folder, as a user would run them."""

    folder: Path
    """Working folder of the commands."""

    mark: str
    """Value of the environment variable MARK, which identifies their processes."""

    preloaded: tuple[str, ...] = ()
    """Modules besides those of launcher that commands which start warm need not import."""

    def __call__(
        self,
        *arguments: str | Path,
        env: dict[str, str] | None = None,
        timeout: float = 240,
        cold: bool = False,
        warm: bool = False,
    ) -> Finished:
        """Run a program and wait for it; fail the test if it exceeds `timeout` seconds."""
        with self.start(*arguments, env=env, cold=cold, warm=warm) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                stdout, stderr = process.communicate()
                pytest.fail(f"{arguments} did not end within {timeout:g} s:\n{stdout}\n{stderr}")
        return Finished(process.returncode, stdout, stderr)

    def start(
        self,
        *arguments: str | Path,
        env: dict[str, str] | None = None,
        cold: bool = False,
        warm: bool = False,
    ) -> subprocess.Popen[str]:
        """Start a program in a session of its own, from the virtual environment if it is there.

        Launchers and files of Python start warm (see warm.py), unless `cold` is true,
        LAUNCHER_TESTS_COLD is set, or `env` has variables that are read before the first line of
        Python runs. The ranks of other launchers then start warm as well, and if `warm` is true
        so does each command of Python that the program starts through its `sys.executable`, or
        that a shell finds by its name.
        """
        script = BIN / str(arguments[0])
        command = [str(script if script.exists() else arguments[0]), *map(str, arguments[1:])]
        variables = self.environment() | (env or {})
        early = any(name.startswith(("PYTHON", "OMP_", "MKL_", "TORCH")) for name in env or {})
        forkable = arguments[0] in SCRIPTS or (
            arguments[0] == "python" and str(arguments[1]).endswith(".py")
        )
        cold = cold or early or "LAUNCHER_TESTS_COLD" in variables
        if warm and not cold:
            variables["PATH"] = f"{_warm(self.preloaded).bin}{os.pathsep}{variables['PATH']}"
        if forkable and not cold:
            warm = warm or arguments[0] in _OTHER_LAUNCHERS
            executable = f"{_warm(self.preloaded).bin}/python" if warm else None
            process = _warm(self.preloaded).start(
                command, self.folder, variables, executable=executable
            )
        else:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        _SESSIONS.setdefault(self.mark, set()).add(process.pid)
        return process

    def environment(self) -> dict[str, str]:
        """Return the environment of this process without the variables of another launcher.

        Threads sleep while they wait, because tests that run side by side share the cores.
        """
        removed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "ACCELERATE_", "SLURM_", "OMP_")
        base = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(removed) or name == "SLURM_CONF"
        }
        return base | {
            MARK: self.mark,
            "OMP_WAIT_POLICY": "PASSIVE",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }


_SECONDS_TO_WAIT = 600
"""How long a test waits for what takes seconds, before it fails rather than hangs."""


def wait_until(condition: Callable[[], object], *processes: subprocess.Popen[str]) -> None:
    """Wait until a condition is true, and fail if one of the processes ends before that.

    A condition that never becomes true fails after some minutes.
    """
    last = time.monotonic() + _SECONDS_TO_WAIT
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < last, f"not within {_SECONDS_TO_WAIT} s"
        time.sleep(0.02)


def has_rows(run_dir: RunDir, number: int) -> bool:
    """Return whether a run has recorded this number of steps."""
    return run_dir.metrics.exists() and run_dir.metrics.read_bytes().count(b"\n") >= number


def train_suite(run: Commands, suite: str, worlds: Sequence[int]) -> Path:
    """Train a suite of matrix.py on each number of ranks; return the parent of on1, on2, ..."""
    finished = run("python", ROOT / "tests/matrix.py", suite, *map(str, worlds), timeout=600)
    assert finished.exit_code == 0, finished.stdout + finished.stderr
    return run.folder


def processes_of(mark: str) -> list[str]:
    """Return the process id and command line of each living process with this mark."""
    processes = []
    sessions = _SESSIONS.get(mark, set())
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            environment = (folder / "environ").read_bytes()
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        marked = int(session) in sessions or f"{MARK}={mark}".encode() in environment.split(b"\0")
        if marked and state not in "ZX":
            processes.append(f"{folder.name} {command}")
    return processes


def fail_on_leftovers(mark: str) -> None:
    """Kill processes with this mark that are running after 10 seconds, and fail if there are any.

    The delay is for processes that the kernel is still ending.
    """
    deadline = time.monotonic() + 10
    while (leftovers := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for line in leftovers:
        os.kill(int(line.split()[0]), signal.SIGKILL)
    assert not leftovers, "processes are still running:\n" + "\n".join(leftovers)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the values of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_weights(run_dir: Path) -> dict[str, Any]:
    """Return the tensors of a finished run's model.safetensors by name."""
    import safetensors.torch  # importing torch takes seconds, and few tests need it

    return safetensors.torch.load_file(run_dir / "model.safetensors")
