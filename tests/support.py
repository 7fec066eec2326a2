"""What tests share: runs of the real command, and a watch for what they leave behind."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from warm import Warm

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MARK = "LAUNCHER_TEST_RUN"

needs_fashion_mnist = pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(),
    reason="needs Debian's package dataset-fashion-mnist, which apt-get could not install",
)


_SESSIONS: dict[str, set[int]] = {}
"""Those that were started under each mark."""


@functools.cache
def _warm() -> Warm:
    """Return this process's server, which starts with the first test that wants it."""
    return Warm(Commands(Path(), "warm").environment())


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    exit_code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Commands:
    """Runs commands of this environment in `folder`, as a user would."""

    folder: Path
    mark: str

    def __call__(
        self, *arguments: str | Path, env: dict[str, str] | None = None, timeout: float = 240
    ) -> Finished:
        """Run a program of the virtual environment and wait for it."""
        with self.start(*arguments, env=env) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                stdout, stderr = process.communicate()
                pytest.fail(f"{arguments} did not end:\n{stdout}\n{stderr}")
        return Finished(process.returncode, stdout, stderr)

    def start(
        self, *arguments: str | Path, env: dict[str, str] | None = None, cold: bool = False
    ) -> subprocess.Popen[str]:
        """Start a program, of the virtual environment first, in a session of its own.

        Those of `launcher` start warm (see warm.py), unless `cold` or LAUNCHER_TESTS_COLD says
        otherwise, or `env` has what is read before the first line of Python.
        """
        ours = BIN / str(arguments[0])
        command = [str(ours if ours.exists() else arguments[0]), *map(str, arguments[1:])]
        whole = self.environment() | (env or {})
        early = any(name.startswith(("PYTHON", "OMP_", "MKL_", "TORCH")) for name in env or {})
        if arguments[0] == "launcher" and not (cold or early or "LAUNCHER_TESTS_COLD" in whole):
            process = _warm().start(command, self.folder, whole)
        else:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=whole,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        _SESSIONS.setdefault(self.mark, set()).add(process.pid)
        return process

    def environment(self) -> dict[str, str]:
        """Return the environment of this process, less what would tell a run where it is.

        Threads sleep while they wait: tests that run side by side have no core for each.
        """
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "ACCELERATE_", "SLURM_", "OMP_")
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(hidden) or name == "SLURM_CONF"
        }
        return kept | {
            MARK: self.mark,
            "OMP_WAIT_POLICY": "PASSIVE",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }


def train_suite(run: Commands, suite: str, worlds: Sequence[int]) -> Path:
    """Train a suite of matrix.py on numbers of ranks; return where folders on1, on2, ... are."""
    done = run("python", ROOT / "tests/matrix.py", suite, *map(str, worlds), timeout=600)
    assert done.exit_code == 0, done.stdout + done.stderr
    return run.folder


def processes_of(mark: str) -> list[str]:
    """Return the command lines of living processes started by the runs with this mark."""
    found = []
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
        ours = int(session) in sessions or f"{MARK}={mark}".encode() in environment.split(b"\0")
        if ours and state not in "ZX":
            found.append(f"{folder.name} {command}")
    return found


def fail_on_leftovers(mark: str) -> None:
    """Fail if processes are left; they get a moment, because the kernel ends them, not we."""
    until = time.monotonic() + 10
    while (left := processes_of(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    for line in left:
        os.kill(int(line.split()[0]), signal.SIGKILL)
    assert not left, "processes were left running:\n" + "\n".join(left)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the values of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_weights(run_dir: Path) -> dict[str, Any]:
    """Return the tensors of a finished run's model.safetensors by name."""
    import safetensors.torch  # torch takes seconds, and few tests need it

    return safetensors.torch.load_file(run_dir / "model.safetensors")
