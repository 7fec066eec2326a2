"""What a run prints, on a terminal and elsewhere, and what it keeps in its logs."""

from __future__ import annotations

import os
import pty
import subprocess
import threading

import pytest
from support import BIN, ROOT, Commands

from launcher.console.progress import metrics_text
from launcher.quantities import duration

RECIPE = ROOT / "tests/recipes/talking.py"


def on_a_terminal(run: Commands, *arguments: str) -> str:
    """Run `launcher` with a terminal of 100 columns; return what it shows."""
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:
                return
            shown.extend(chunk)

    reader = threading.Thread(target=read)
    process = subprocess.Popen(
        [BIN / "launcher", *arguments],
        cwd=run.folder,
        env=run.environment() | {"TERM": "xterm", "COLUMNS": "100"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    reader.start()
    assert process.wait(timeout=120) == 0
    reader.join(timeout=30)
    os.close(ours)
    return shown.decode()


def test_a_terminal_has_a_bar(run: Commands) -> None:
    """There is a bar that is drawn over itself, and what a recipe prints stands above it."""
    shown = on_a_terminal(run, "run", str(RECIPE), "-n", "2", "--out", "out")
    assert "\x1b[2K" in shown
    assert "5/5" in shown
    for word in ("loss ", "lr ", "samples/s", "left"):
        assert word in shown
    assert "\r\x1b[2Ksaid by rank 0\r\n" in shown or "\nsaid by rank 0\r\n" in shown
    assert shown.endswith("run folder: out\r\n")
    log = (run.folder / "out/logs/rank0.log").read_text()
    assert "\x1b" not in log, "the log has lines, not a bar"
    assert "step 5/5  loss" in log


def test_other_output_has_lines_and_logs(run: Commands) -> None:
    """Rank 0 is heard on the terminal; each rank's log has all that the rank wrote."""
    done = run("launcher", "run", RECIPE, "-n", "2", "--out", "out")
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    assert "step 5/5  loss" in done.stdout
    calls = 4 + 5 + 2  # in the trial, in the steps, and in the evaluation
    assert done.stdout.count("said by rank 0") == calls
    assert "rank 1" not in done.stdout + done.stderr
    for rank in range(2):
        log = (run.folder / f"out/logs/rank{rank}.log").read_text()
        assert log.count(f"said by rank {rank}") == calls
        assert log.count(f"written by rank {rank}") == calls
        assert f"rank {1 - rank}" not in log


def test_a_reader_that_has_had_enough_stops_nothing(run: Commands) -> None:
    """With its output cut off (`| head -1`), a run trains to the end."""
    command = f"launcher run {RECIPE} -n 2 --out out | head -1"
    done = run("bash", "-c", f"set -o pipefail; {command}")
    assert done.exit_code == 0, done.stderr
    assert (run.folder / "out/result.json").is_file()
    assert "run folder: out" in (run.folder / "out/logs/rank0.log").read_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")],
)
def test_durations(seconds: float | None, text: str) -> None:
    """Spans of time have two units at most."""
    assert duration(seconds) == text


def test_metrics_end_with_the_loss() -> None:
    """The metric that people look for comes first."""
    assert metrics_text({"loss": 0.5, "accuracy": 0.97}) == "accuracy 0.9700  loss 0.5000"


def test_output_that_cannot_be_written_is_said(run: Commands) -> None:
    """On a full disk a command says so in one message, and a run goes on without its output."""
    recipe = ROOT / "tests/recipes/starting.py"
    done = run("bash", "-c", f"launcher plan {recipe} train_samples=64 >/dev/full")
    assert done.exit_code == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("bash", "-c", f"launcher run {recipe} -n 1 train_samples=64 --out out >/dev/full")
    assert done.exit_code == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (run.folder / "out/result.json").is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_log_stops_no_run(run: Commands) -> None:
    """A recipe may print on a full disk; the reason of a failure is shown if it finds no room."""
    disk = run.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", disk], check=False
    )
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        recipe = f"{ROOT / 'tests/recipes/talking.py'}:shouting"
        done = run("launcher", "run", recipe, "-n", "2", "--out", disk / "out")
        assert done.exit_code == 1
        for rank in range(2):
            assert done.stderr.count(f"rank{rank}.log: No space left on device") == 1
        assert "step 5/5" in done.stdout
        assert "model.safetensors" in done.stderr
        assert not (disk / "out/failure.json").exists()
    finally:
        subprocess.run(["umount", disk], check=True)
