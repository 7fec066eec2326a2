"""Output of a run on a terminal, in a pipe and on a full disk, and the contents of its logs."""

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
    """Run `launcher` on a terminal of 100 columns; return everything that it prints there."""
    controller, terminal = pty.openpty()
    output = bytearray()

    def read() -> None:
        while True:
            try:
                chunk = os.read(controller, 4096)
            except OSError:
                return
            output.extend(chunk)

    reader = threading.Thread(target=read)
    process = subprocess.Popen(
        [BIN / "launcher", *arguments],
        cwd=run.folder,
        env=run.environment() | {"TERM": "xterm", "COLUMNS": "100"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    reader.start()
    assert process.wait(timeout=120) == 0
    reader.join(timeout=30)
    os.close(controller)
    return output.decode()


def test_a_terminal_shows_a_bar(run: Commands) -> None:
    """A bar is redrawn in place, and the output of the recipe appears above it."""
    output = on_a_terminal(run, "run", str(RECIPE), "-n", "2", "--out", "out")
    assert "\x1b[2K" in output
    assert "5/5" in output
    for word in ("loss ", "lr ", "samples/s", "left"):
        assert word in output
    assert "\r\x1b[2Ksaid by rank 0\r\n" in output or "\nsaid by rank 0\r\n" in output
    assert output.endswith("run folder: out\r\n")
    log = (run.folder / "out/logs/rank0.log").read_text()
    assert "\x1b" not in log, "the log has lines, not a bar"
    assert "step 5/5  loss" in log


def test_a_pipe_gets_lines(run: Commands) -> None:
    """A pipe gets lines from rank 0 alone; the log of each rank has everything it printed."""
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


def test_a_closed_pipe_does_not_stop_a_run(run: Commands) -> None:
    """A run whose output is piped to `head -1` trains to the end."""
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
    """A duration is shown in at most two units."""
    assert duration(seconds) == text


def test_metrics_end_with_the_loss() -> None:
    """Metrics are shown with the loss last."""
    assert metrics_text({"loss": 0.5, "accuracy": 0.97}) == "accuracy 0.9700  loss 0.5000"


def test_output_to_a_full_disk(run: Commands) -> None:
    """A command whose output cannot be written fails with one message; a run trains to the end."""
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
def test_logs_on_a_full_disk_do_not_stop_a_run(run: Commands) -> None:
    """A run with unwritable logs takes every step, and shows a failure that it cannot record."""
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
