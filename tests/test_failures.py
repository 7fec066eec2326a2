"""A run that fails: one clear error, the right exit code, nothing left running."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from support import ROOT, Commands, Finished, processes_of

RECIPE = ROOT / "tests/recipes/failing.py"


def fail(run: Commands, how: str, *arguments: str) -> Finished:
    """Train a recipe that fails on rank 1, on two ranks."""
    return run("launcher", "run", RECIPE, f"how={how}", "--out", "out", "-n", "2", *arguments)


@pytest.mark.parametrize(
    ("how", "exit_code", "message"),
    [
        ("raise", 1, "ValueError: the loss of rank one"),
        ("kill", 1, "rank 1 was killed by SIGKILL"),
        ("exit", 1, "rank 1 ended with exit code 7"),
        ("sample", 1, "raised OSError for sample 77 (epoch 0): truncated file"),
        ("worker-killed", 1, "A DataLoader worker died"),
        ("nan", 1, "At step 1 the loss is nan"),
        ("data", 1, "FileNotFoundError: no folder /data/images"),
        ("empty", 2, "The train data is empty"),
        ("count", 2, "counted 2 items, and the global batch holds 62"),
        ("mean", 2, "expected (sum, count)"),
    ],
)
def test_a_failure_is_shown_once(run: Commands, how: str, exit_code: int, message: str) -> None:
    """The first failure is said once, last, with the exit code of its kind."""
    done = fail(run, how, "rank=1")
    assert done.exit_code == exit_code, done.stderr
    assert (done.stdout + done.stderr).count(message) == 1
    assert message in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") <= 1
    assert done.stderr.startswith("launcher: "), "nothing but our own words"
    assert not (run.folder / "out/result.json").exists()
    if exit_code == 1:
        log = Path(done.stderr.rpartition("log: ")[2].strip())
        assert log.is_file()


def test_the_failing_rank_keeps_its_traceback(run: Commands) -> None:
    """failure.json says which rank failed, where and how; its log has the same."""
    fail(run, "raise", "rank=1")
    failure = json.loads((run.folder / "out/failure.json").read_text())
    assert (failure["rank"], failure["error"]) == (1, "ValueError")
    assert "_fail_at_second_call" in failure["traceback"]
    assert failure["traceback"] in (run.folder / "out/logs/rank1.log").read_text()


def test_a_rank_of_torchrun_fails(run: Commands) -> None:
    """Under torchrun the failing rank shows its traceback, and the other is quiet."""
    done = run(
        "torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        RECIPE,
        "how=raise",
        "rank=1",
        "--out",
        "out",
    )
    assert done.exit_code != 0
    assert done.stderr.count("ValueError: the loss of rank one") == 1
    assert "log: " in done.stderr


@pytest.mark.parametrize("stage", ["forkserver", "resource_tracker"])
def test_ctrl_c_before_there_are_ranks(run: Commands, stage: str) -> None:
    """Ctrl-C while torch is being imported or ranks are being started is a line as well."""
    process = run.start("launcher", "run", RECIPE, "how=hang", "-n", "2", "--out", "out")
    until = time.monotonic() + 30
    while not any(stage in each for each in processes_of(run.mark)):
        assert time.monotonic() < until, "it was never started"
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == "launcher: stopped by SIGINT"


def test_ctrl_c_ends_a_single_process(run: Commands) -> None:
    """Ctrl-C ends a recipe that runs by itself, in a line."""
    process = run.start("python", RECIPE, "how=hang", "--out", "out")
    assert process.stdout is not None
    for line in process.stdout:
        if "hanging" in line:
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == "launcher: stopped by Ctrl-C"


@pytest.mark.parametrize("whom", ["launcher", "all"])
def test_ctrl_c_ends_the_run(run: Commands, whom: str) -> None:
    """Ctrl-C, to the launcher alone or as a terminal sends it to all, ends everything in a line."""
    process = run.start("launcher", "run", RECIPE, "how=hang", "rank=0", "-n", "2", "--out", "out")
    assert process.stdout is not None
    for line in process.stdout:
        if "hanging" in line:
            break
    if whom == "launcher":
        process.send_signal(signal.SIGINT)
    else:
        os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == "launcher: stopped by SIGINT"
    assert stdout.strip() == ""


def test_ranks_end_with_a_launcher_that_is_killed(run: Commands) -> None:
    """SIGKILL of the launcher leaves no rank and no DataLoader worker."""
    process = run.start("launcher", "run", RECIPE, "how=hang", "rank=0", "-n", "2", "--out", "out")
    assert process.stdout is not None
    for line in process.stdout:
        if "hanging" in line:
            break
    assert len(processes_of(run.mark)) >= 5, "launcher, two ranks, two workers"
    drain = threading.Thread(target=process.communicate)
    drain.start()
    process.kill()
    drain.join(30)
    assert not drain.is_alive(), "somebody still holds the output"
