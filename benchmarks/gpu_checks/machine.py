"""The devices of the checks, and how checks run commands of launcher on them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
from contest import BIN, HERE

from launcher.runs.rundir import RunDir

SECONDS_OF_A_COMMAND = 240
"""Longest time of a command; after it, the check has failed."""


class NotMeasurableError(Exception):
    """A check cannot be made on this machine; the text is the reason."""


Verdict = tuple[str, str, bool]
"""What was measured, what was expected, and whether the check passed."""


@dataclass(frozen=True)
class Machine:
    """The devices of the checks, and the folder for their runs."""

    device: str
    """cuda or cpu."""

    ranks: int
    """The number of GPUs, or of CPU ranks."""

    folder: Path

    @property
    def is_rehearsal(self) -> bool:
        """Whether the checks run on CPU ranks, where times mean nothing."""
        return self.device == "cpu"

    def launcher(self, *arguments: str | Path, ok: Sequence[int] = (0,)) -> str:
        """Run a command of launcher and return its standard output.

        Args:
            arguments: The arguments.
            ok: Exit codes that are accepted.

        Raises:
            click.ClickException: It ended with another exit code; the message has its last lines.
            subprocess.TimeoutExpired: It did not end.
        """
        return self._run([str(BIN / "launcher"), *map(str, arguments)], ok)

    def probe(self, module: str, name: str, *arguments: str) -> dict[str, Any]:
        """Return what a function of a module of this package measured, in a process of its own.

        Raises:
            NotMeasurableError: The function says so.
            click.ClickException: It failed.
        """
        command = [sys.executable, "-m", f"gpu_checks.{module}", name, self.device, *arguments]
        printed = self._run(command, (0,), {"PYTHONPATH": str(HERE)})
        measured: dict[str, Any] = json.loads(printed.splitlines()[-1])
        if reason := measured.get("not measurable"):
            raise NotMeasurableError(reason)
        return measured

    def _run(
        self, command: list[str], ok: Sequence[int], variables: dict[str, str] | None = None
    ) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=os.environ | (variables or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS_OF_A_COMMAND,
        )
        if done.returncode not in ok:
            lines = [*done.stdout.splitlines(), *done.stderr.splitlines()][-15:]
            raise click.ClickException("\n".join([f"exit code {done.returncode}", *lines]))
        return done.stdout

    def train(self, recipe: str, out: str, *settings: str, ranks: int | None = None) -> RunDir:
        """Train a recipe on some ranks, all of them by default, and return the run folder."""
        count = str(ranks or self.ranks)
        device = f"device={self.device}"
        self.launcher("run", recipe, "-n", count, "-q", "--out", out, device, *settings)
        return RunDir(self.folder / out)

    @contextlib.contextmanager
    def started(
        self, recipe: str, out: str, *settings: str
    ) -> Iterator[tuple[subprocess.Popen[str], RunDir]]:
        """Start a run on all ranks, and kill what is left of it at the end."""
        command = [str(BIN / "launcher"), "run", recipe, "-n", str(self.ranks), "-q", "--out", out]
        process = subprocess.Popen(
            [*command, f"device={self.device}", *settings],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield process, RunDir(self.folder / out)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds.

    Raises:
        click.ClickException: The process ended before.
        TimeoutError: The condition did not come to hold.
    """
    deadline = time.monotonic() + SECONDS_OF_A_COMMAND
    while not condition():
        if process.poll() is not None:
            raise click.ClickException(f"the run ended early:\n{process.communicate()[1][-2000:]}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run made no progress for {SECONDS_OF_A_COMMAND} s")
        time.sleep(0.05)


def steps_of(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the lines of a run's steps."""
    if not run_dir.metrics.exists():
        return []
    lines = run_dir.metrics.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if "loss" in row]


def second_half(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the lines of the steps of the second half of a run, which are warm."""
    rows = steps_of(run_dir)
    return rows[len(rows) // 2 :]


def speed_of(run_dir: RunDir) -> float:
    """Return the samples per second of the second half of a run."""
    return float(median(row["samples_per_second"] for row in second_half(run_dir)))
