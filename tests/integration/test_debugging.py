"""Debuggers in runs, on a terminal of their own: `breakpoint()` on ranks, and `run --debug`."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from support import ROOT, Commands, read_lines

RECIPE = f"{ROOT / 'tests/recipes/debugged.py'}:debugged"


@dataclass
class Session:
    """A command on a terminal."""

    process: subprocess.Popen[str]
    terminal: int
    """The side of the terminal at which a person would sit."""

    shown: str = ""
    """What the terminal has shown so far."""

    read: int = 0
    """Characters of it that `until` has passed."""

    def until(self, words: str, seconds: float = 60) -> str:
        """Wait for words on the terminal; return what it showed since the last call."""
        deadline = time.monotonic() + seconds
        while (place := self.shown.find(words, self.read)) < 0:
            assert time.monotonic() < deadline, f"{words!r} is missing:\n{self.shown[self.read :]}"
            self._read()
        new, self.read = self.shown[self.read : place + len(words)], place + len(words)
        return new

    def _read(self) -> bool:
        """Read what the terminal shows now; return whether it showed anything."""
        ready, _, _ = select.select([self.terminal], [], [], 0.05)
        self.shown += os.read(self.terminal, 1 << 16).decode() if ready else ""
        return bool(ready)

    def type(self, line: str) -> None:
        """Type a line."""
        os.write(self.terminal, f"{line}\n".encode())

    def end(self) -> int:
        """Read until the command ends; return its exit code."""
        while self.process.poll() is None or self._read():
            self._read()
        return self.process.returncode


@contextlib.contextmanager
def on_terminal(run: Commands, *arguments: str) -> Iterator[Session]:
    """Start the command line on a terminal."""
    leader, follower = pty.openpty()
    try:
        name = os.ttyname(follower)
        process = run.start("python", ROOT / "tests/on_terminal.py", name, *arguments)
        with process:
            session = Session(process, leader)
            yield session
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    finally:
        os.close(leader)
        os.close(follower)


def test_ranks_take_turns_in_the_debugger(run: Commands) -> None:
    """Each rank that calls breakpoint() gets the terminal in turn, and nothing else hangs."""
    with on_terminal(run, "run", RECIPE, "-n", "2", "how=breakpoint", "ranks=01") as session:
        first = re.search(r"\(Pdb rank (\d)\) ", session.until(") "))
        assert first, session.shown
        session.type("p 'shape', tuple(logits.shape)")
        session.until("('shape', (")
        time.sleep(2.5)  # longer than the limit of a step
        session.type("print(calls, 'calls')")
        between = session.until("2 calls")
        assert "step" not in between
        session.type("c")
        session.until(f"(Pdb rank {1 - int(first[1])}) ")
        session.type("c")
        session.until("4 steps")
        assert session.end() == 0, session.shown
    (folder,) = (run.folder / "runs").iterdir()
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl") if "lr" in line] == [
        1, 2, 3, 4
    ]  # fmt: skip


def test_the_debugger_of_one_process(run: Commands) -> None:
    """With --debug, breakpoint() and pdb after an error work on the terminal of the command."""
    more = "strategy=fsdp", "shard=all", "compile=true"
    with on_terminal(run, "run", RECIPE, "--debug", "how=breakpoint", *more) as session:
        plan = session.until("(Pdb) ")
        for setting in ("strategy=ddp", "shard=node", "compile=False", "num_workers=0"):
            assert setting in plan
        assert "<frozen" not in plan
        session.type("import os, torch; print(torch.is_anomaly_enabled(), os.getppid())")
        session.until(f"True {os.getpid()}")
        session.type("c")
        session.until("4 steps")
        assert session.end() == 0, session.shown
    with on_terminal(run, "run", RECIPE, "--pdb", "how=shape", "--out", "failed") as session:
        error = session.until("(Pdb) ")
        assert re.search(r"cut +float32 \[62, 3\] on cpu, requires_grad", error)
        assert re.search(r"batch\[0\] +float32 \[62, 1, 8, 8\] on cpu\r", error)
        session.type("p tuple(cut.shape)")
        session.until("(62, 3)")
        session.type("q")
        assert session.end() == 1, session.shown
    assert (run.folder / "failed/failure.json").exists()


def test_quitting_the_debugger_of_a_rank_ends_the_run(run: Commands) -> None:
    """The command q ends all ranks at once, with a message that has no traceback."""
    with on_terminal(run, "run", RECIPE, "-n", "2", "how=breakpoint", "ranks=1") as session:
        session.until("(Pdb rank 1) ")
        session.type("q")
        assert session.end() == 1, session.shown
    assert "The command q of the debugger ended the run" in session.shown
    assert "Traceback" not in session.shown


def test_a_worker_is_debugged(run: Commands) -> None:
    """breakpoint() in a DataLoader worker gets the terminal while all ranks wait for its sample."""
    with on_terminal(run, "run", RECIPE, "-n", "2", "how=sample") as session:
        session.until("worker 0) ")
        time.sleep(2.5)  # longer than the limit of a step
        session.type("p 'index', index")
        session.until("('index', 200)")
        session.type("c")
        session.until("4 steps")
        assert session.end() == 0, session.shown


def test_interrupt_in_the_debugger_stops_the_run(run: Commands) -> None:
    """Ctrl-C at the prompt of a rank leaves the debugger open; the run stops after the step."""
    more = "how=breakpoint", "steps=100000"
    with on_terminal(run, "run", RECIPE, "-n", "2", *more) as session:
        session.until("(Pdb rank 0) ")
        session.type("\x03")
        session.until("stopping after this step")
        session.type("c")
        session.until("launcher resume runs/")
        assert session.end() == 75, session.shown


def test_a_run_without_a_terminal_goes_on(run: Commands) -> None:
    """Without a terminal the ranks go on past a breakpoint, and one line says so."""
    done = run("launcher", "run", RECIPE, "-n", "2", "how=breakpoint", "ranks=01", "-q")
    assert done.exit_code == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.search(r"rank [01] went on past breakpoint\(\) in .*debugged\.py, line \d+", line)


@pytest.mark.parametrize(
    "options", [("-n", "2"), ("--hosts", "a,b"), ("--continue", "--out", "x"), ("--nodes", "2")]
)
def test_what_needs_other_processes_is_no_debugging(
    run: Commands, options: tuple[str, ...]
) -> None:
    """--debug refuses options that need other processes, before the recipe is imported."""
    done = run("launcher", "run", "missing", "--debug", *options)
    assert done.exit_code == 2
    assert "--debug trains in one process" in done.stderr
