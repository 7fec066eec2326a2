"""`launcher watch` and `launcher runs`, states of runs, and the output of a run itself."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import BIN, ROOT, Commands, read_lines

from launcher.runs.history import History
from launcher.runs.ownership import own_run_dir
from launcher.runs.run_record import read_run, write_resumption, write_run
from launcher.runs.rundir import RunDir
from launcher.runs.status import read_run_state

STRAGGLING = ROOT / "tests/recipes/straggling.py"

FAILING = ROOT / "tests/recipes/failing.py"

LONG = ("-n", "2", "epochs=2000", "pause=0.005", "checkpoint_every=50")


@pytest.fixture(scope="module")
def runs(module_run: Commands) -> Commands:
    """Return a folder with two finished runs and a failed one."""
    for arguments, code in (
        (("digits", "-n", "2", "epochs=2", "--out", "runs/good"), 0),
        (("digits", "-n", "1", "epochs=1", "lr=0.2", "--out", "runs/sweep/0"), 0),
        ((FAILING, "-n", "2", "how=raise", "rank=1", "--out", "runs/bad"), 1),
    ):
        done = module_run("launcher", "run", *arguments)
        assert done.exit_code == code, done.stderr
    return module_run


@pytest.fixture
def running(run: Commands) -> Iterator[subprocess.Popen[str]]:
    """Start a run that would take minutes, wait for its first steps, and stop it at the end."""
    process = run.start("launcher", "run", STRAGGLING, *LONG, "--out", "out")
    metrics = run.folder / "out/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, "steps")
    yield process
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait until a condition holds, and fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)


class OnTerminal:
    """A process on a pseudo-terminal of 110 columns and 40 lines."""

    def __init__(self, run: Commands, *arguments: str, **env: str) -> None:
        controller, terminal = pty.openpty()
        self.output = bytearray()
        self.process = subprocess.Popen(
            [BIN / "launcher", *arguments],
            cwd=run.folder,
            env=run.environment() | {"TERM": "xterm", "COLUMNS": "110", "LINES": "40"} | env,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        self._controller = controller
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self.output.extend(os.read(self._controller, 65536))
            except OSError:
                return

    @property
    def text(self) -> str:
        """The output so far, without escape sequences for colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.output.decode(errors="replace"))

    def end(self, code: int) -> str:
        """Wait for the process to exit with `code` and return its output."""
        assert self.process.wait(timeout=90) == code, self.text
        self._reader.join(timeout=30)
        os.close(self._controller)
        return self.text


@pytest.mark.usefixtures("running")
def test_a_run_is_watched_on_a_terminal(run: Commands, running: subprocess.Popen[str]) -> None:
    """The screen shows progress, curves, a bar for each rank and the straggler."""
    terminal = OnTerminal(run, "watch", "out")
    wait_for(lambda: re.search(r"rank 1 \(\d", terminal.text) is not None, "the straggler")
    running.send_signal(signal.SIGINT)
    shown = terminal.end(75)
    assert re.search(r"step [\d,]+/24,000 ", shown)
    for label in (
        "loss ",
        "samples/s ",
        "lr ",
        "step time ",
        "rank 0 ",
        "left",
        "2 CPU ranks, ddp",
    ):
        assert label in shown, label
    bars = {rank: re.findall(rf"rank {rank} +(█+)░* ", shown)[-1] for rank in "01"}
    assert len(bars["1"]) > len(bars["0"])
    assert re.search(r"rank 1 .* ms +(computing|reading data|saving) +[\d.]+ MiB +\d+%", shown)
    assert "stopped after step" in shown


def test_a_run_is_watched_without_a_terminal(run: Commands, running: subprocess.Popen[str]) -> None:
    """Without a terminal `watch` prints lines or JSON lines, and Ctrl-C leaves the run running."""
    plain = run.start("launcher", "watch", "out")
    lines = run.start("launcher", "watch", "out", "--json")
    assert plain.stdout is not None
    assert lines.stdout is not None
    first = plain.stdout.readline()
    assert re.match(r"step [\d,]+/24,000  loss \d.*samples/s  .* left$", first), first
    values: dict[str, Any] = json.loads(lines.stdout.readline())
    assert values["state"] == "running"
    assert values["total_steps"] == 24_000
    assert values["latest"]["loss"] > 0
    plain.send_signal(signal.SIGINT)
    _, error = plain.communicate(timeout=60)
    assert plain.returncode == 130
    assert "launcher watch out" in error
    assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    rest, _ = lines.communicate(timeout=60)
    assert lines.returncode == 75
    assert json.loads(rest.splitlines()[-1])["state"] == "stopped"


def test_an_ended_run_is_shown_once(runs: Commands) -> None:
    """Watching a run that has ended prints its result once and returns its exit code."""
    done = runs("launcher", "watch", "runs/good")
    assert (done.exit_code, done.stdout.count("\n")) == (0, 1)
    assert re.match(r"finished after 24 steps: loss \d\.\d+, accuracy 0\.\d+\n", done.stdout)
    done = runs("launcher", "watch", "runs/bad")
    assert done.exit_code == 1
    assert "failed on rank 1" in done.stdout
    done = runs("launcher", "watch", "runs/none")
    assert done.exit_code == 2
    assert "runs/none" in done.stderr


def test_runs_are_listed(runs: Commands) -> None:
    """`launcher runs` lists runs by start time, or filtered and sorted by any value."""
    done = runs("launcher", "runs")
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["run", "state", "recipe", "ranks", "step", "result", "took", "began"]
    assert [line.split()[0] for line in lines] == ["runs/good", "runs/sweep/0", "runs/bad"]
    assert [line.split()[1] for line in lines] == ["finished", "finished", "failed"]
    assert "ValueError: the loss of rank one" in lines[2]
    by_lr = runs("launcher", "runs", "state=finished", "--sort", "lr", "--reverse").stdout
    assert [line.split()[0] for line in by_lr.splitlines()[1:]] == ["runs/sweep/0", "runs/good"]
    rows = json.loads(runs("launcher", "runs", "runs/sweep", "lr=0.2", "--json").stdout)
    assert [row["run"] for row in rows] == ["runs/sweep/0"]
    assert rows[0]["settings"]["epochs"] == 1
    assert rows[0]["step"] == rows[0]["total_steps"] == 12
    assert "3 runs" in runs("launcher", "runs", "lr=7").stdout


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["stat=finished"], "'stat'. Did you mean state"),
        (["state=finishd"], "Did you mean finished"),
        (["--sort", "accurac"], "Did you mean accuracy"),
        (["nowhere"], "NAME=VALUE"),
    ],
)
def test_an_unknown_name_is_refused(runs: Commands, arguments: list[str], fragment: str) -> None:
    """A name that no run has gives exit code 2 and suggests the nearest one."""
    done = runs("launcher", "runs", *arguments)
    assert done.exit_code == 2
    assert fragment in done.stderr


def test_an_empty_folder_has_no_runs(run: Commands) -> None:
    """Below a folder without runs `launcher runs` prints one line, and an empty list as JSON."""
    assert run("launcher", "runs").stdout.count("\n") == 1
    assert run("launcher", "runs", "--json").stdout == "[]\n"


def test_a_killed_run_is_lost(run: Commands) -> None:
    """A run whose processes were all killed is lost, and its state names the last step."""
    process = run.start("launcher", "run", STRAGGLING, *LONG, "--out", "out", cold=True)
    metrics = run.folder / "out/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, "steps")
    assert read_run_state(RunDir(run.folder / "out")).name == "running"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for(lambda: read_run_state(RunDir(run.folder / "out")).name != "running", "its end")
    state = read_run_state(RunDir(run.folder / "out"))
    assert state.name == "lost"
    assert re.search(r"step \d+", state.words)
    done = run("launcher", "watch", "out")
    assert done.exit_code == 1


def test_measurements_are_not_listed(run: Commands) -> None:
    """Folders of measurements have a run.yaml and are not listed as runs."""
    done = run("launcher", "profile", "digits", "-n", "1", "--steps", "2", "--out", "measured")
    assert done.exit_code == 0, done.stderr
    assert (run.folder / "measured/run.yaml").is_file()
    assert run("launcher", "runs", "--json").stdout == "[]\n"


def test_a_quiet_run_prints_nothing(run: Commands) -> None:
    """With --quiet the progress goes to the log alone, and errors are still printed."""
    done = run("launcher", "run", "digits", "-n", "2", "epochs=1", "-q", "--out", "out")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    assert "step 12/12  loss" in (run.folder / "out/logs/rank0.log").read_text()
    done = run("launcher", "run", FAILING, "-n", "2", "how=raise", "--quiet")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "ValueError: the loss of rank one" in done.stderr


def test_a_run_prints_json(run: Commands) -> None:
    """With --json every line is JSON: the plan, steps, evaluations and the result."""
    done = run("launcher", "run", "digits", "-n", "2", "epochs=2", "--json", "--out", "out")
    assert done.exit_code == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0]["event"] == "planned"
    assert lines[0]["plan"]["total_steps"] == 24
    assert lines[0]["run_dir"] == str(run.folder / "out")
    stepped = [line for line in lines if line["event"] == "stepped"]
    assert stepped[-1]["step"] == stepped[-1]["total_steps"] == 24
    evaluated = [line for line in lines if line["event"] == "evaluated"]
    assert [line["step"] for line in evaluated] == [12, 24]
    assert lines[-1]["event"] == "finished"
    assert lines[-1]["evaluation"] == evaluated[-1]["evaluation"]
    done = run("launcher", "run", "digits", "--json", "--quiet")
    assert done.exit_code == 2


def test_colours_need_a_terminal(runs: Commands) -> None:
    """Output is coloured on a terminal, but not in a pipe and not with NO_COLOR."""
    assert "\x1b" not in runs("launcher", "runs").stdout
    assert b"\x1b[32mfinished" in _shown(runs, "runs")
    assert b"\x1b[" not in _shown(runs, "runs", NO_COLOR="1")
    assert b"\x1b[31m\x1b[1mlauncher:" in _shown(runs, "report", "none", code=2)
    assert b"\x1b[" not in _shown(runs, "report", "none", code=2, NO_COLOR="1")


def _shown(run: Commands, *arguments: str, code: int = 0, **env: str) -> bytes:
    terminal = OnTerminal(run, *arguments, **env)
    terminal.end(code)
    return bytes(terminal.output)


def test_a_resumed_run_is_starting(runs: Commands, tmp_path: Path) -> None:
    """A resumed run counts as starting until its first rank does, or its launcher has ended."""
    for name in ("runs/good", "runs/bad"):
        copy = tmp_path / name
        shutil.copytree(runs.folder / name, copy)
        assert read_run_state(RunDir(copy)).name in ("finished", "failed")
        with own_run_dir(RunDir(copy)):
            write_resumption(RunDir(copy), read_run(RunDir(copy)))
            assert read_run_state(RunDir(copy)).words == "starting"
        assert read_run_state(RunDir(copy)).name != "running"


def test_a_history_shows_what_it_is_of(runs: Commands) -> None:
    """A history is shown as its run folder and the state of the run."""
    shown = repr(History(RunDir(runs.folder / "runs/good")))
    assert "runs/good" in shown
    assert "finished after 24 steps" in shown


def test_a_run_without_checkpoints_starts_again_with_its_settings(runs: Commands) -> None:
    """Without a checkpoint to resume from, the error has the command that started the run."""
    copy = runs.folder / "bare"
    shutil.copytree(runs.folder / "runs/good", copy)
    shutil.rmtree(copy / "checkpoints")
    done = runs("launcher", "resume", copy)
    shutil.rmtree(copy)
    assert done.exit_code == 2
    assert "`launcher run digits -n 2 epochs=2 --out runs/good`" in done.stderr


def test_a_launcher_that_was_killed_is_not_starting(runs: Commands, tmp_path: Path) -> None:
    """A run whose launcher was killed before its first rank started is lost at once."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    pid = os.fork()
    if pid == 0:
        with own_run_dir(run_dir):
            write_run(run_dir, read_run(RunDir(runs.folder / "runs/good")))
            os._exit(0)
    os.waitpid(pid, 0)
    assert run_dir.owner.stat().st_size > 0
    assert read_run_state(run_dir).name == "lost"


def test_events_of_a_finished_run(runs: Commands) -> None:
    """events.jsonl has the start, the counted forward pass, checkpoints and the end, in order."""
    events = read_lines(runs.folder / "runs/good/events.jsonl")
    assert [event["event"] for event in events] == [
        "began",
        "counted",
        "saved",
        "saved",
        "finished",
    ]
    assert events[0]["ranks"] == 2
    assert events[0]["step"] == 0
    assert [event["step"] for event in events[-2:]] == [24, 24]
    times = [event["time"] for event in events]
    assert times == sorted(times)


def test_events_of_a_restarted_run(run: Commands, tmp_path: Path) -> None:
    """A restart removes failure.json and keeps the failure in events.jsonl."""
    arguments = ("launcher", "run", FAILING, "-n", "2", "how=raise-once", "--max-restarts", "1")
    done = run(*arguments, "checkpoint_every=2", "--out", "out")
    assert done.exit_code == 0, done.stderr
    events = read_lines(tmp_path / "out/events.jsonl")
    names = [event["event"] for event in events if event["event"] not in ("counted", "saved")]
    assert names == ["began", "failed", "began", "finished"]
    failed = next(event for event in events if event["event"] == "failed")
    assert failed["error"] == "ValueError"
    assert not (tmp_path / "out/failure.json").exists()
