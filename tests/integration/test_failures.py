"""A run that fails shows one clear error, exits with the right code, and leaves no process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import ROOT, Commands, Finished, processes_of, read_lines

from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.failure_record import read_failure
from launcher.runs.rundir import RunDir

RECIPE = ROOT / "tests/recipes/failing.py"


def fail(run: Commands, how: str, *arguments: str) -> Finished:
    """Train a recipe that fails in the way `how`, on two ranks."""
    with tempfile.TemporaryDirectory() as temporary:
        command = ["launcher", "run", str(RECIPE), f"how={how}", "--out", "out", "-n", "2"]
        done = run(*command, *arguments, env={"TMPDIR": temporary})
        assert os.listdir(temporary) == [], "nothing is left there"  # noqa: PTH208
    return done


_SECONDS_TO_FAIL = 30
"""Less than `hang_timeout`, and than the life of the process that the rank of "orphan" forks."""

_SILENT = ("kill", "kill-beside-c", "exit", "leave")
"""Failures of which the rank writes nothing to its log."""


@pytest.mark.parametrize(
    ("how", "exit_code", "message"),
    [
        ("raise", 1, "ValueError: the loss of rank one"),
        ("kill", 1, "rank 1 was killed by SIGKILL"),
        ("kill-beside-c", 1, "rank 1 was killed by SIGKILL"),
        ("exit", 1, "rank 1 ended with exit code 7"),
        ("sample", 1, "raised OSError for sample 77 (epoch 0): truncated file"),
        ("worker-killed", 1, "DataLoader worker died"),
        ("leave", 1, "rank 1 ended with exit code 0 before the run did"),
        ("mute", 1, "failing._Mute: <exception str() failed>"),
        ("quit", 1, "SystemExit: 0"),
        ("worker-quit", 1, "raised SystemExit for sample 77 (epoch 0): 0"),
        ("nan", 1, "At step 3 the loss is nan"),
        ("data", 1, "FileNotFoundError: no folder /data/images"),
        ("empty", 2, "The train data is empty"),
        ("count", 1, "counted 2 items"),
        ("mean", 2, "expected (sum, count)"),
    ],
)
def test_a_failure_is_shown_once(run: Commands, how: str, exit_code: int, message: str) -> None:
    """The first failure is shown once and last, and sets the exit code."""
    start = time.monotonic()
    done = fail(run, how, "rank=1")
    assert time.monotonic() - start < _SECONDS_TO_FAIL
    assert done.exit_code == exit_code, done.stderr
    assert (done.stdout + done.stderr).count(message) == 1
    assert message in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") <= 1
    assert done.stderr.startswith("launcher: "), "only launcher writes to stderr"
    assert not (run.folder / "out/result.json").exists()
    if exit_code == 1:
        log, _, line = done.stderr.rpartition("log: ")[2].partition(", line ")
        lines = Path(log.strip()).read_text().splitlines()
        if line:
            error = "\n".join(lines[int(line) - 1 :])
            assert how in _SILENT or message in error


def test_a_process_that_a_failed_rank_started_is_not_waited_for(run: Commands) -> None:
    """A process that holds the connections and pipes of a failed rank does not delay the end."""
    start = time.monotonic()
    command = f"launcher run {RECIPE} how=orphan rank=1 -n 2 --out out >out.txt 2>&1"
    done = run("bash", "-c", command)
    seconds = time.monotonic() - start
    for line in processes_of(run.mark):
        os.kill(int(line.split()[0]), signal.SIGKILL)
    assert done.exit_code == 1
    assert "ValueError: the loss of rank one" in (run.folder / "out.txt").read_text()
    assert seconds < _SECONDS_TO_FAIL


def test_the_failing_rank_keeps_its_traceback(run: Commands) -> None:
    """failure.json holds the traceback from the recipe on, and the log holds the whole one."""
    fail(run, "raise", "rank=1")
    failure = read_failure(RunDir(run.folder / "out"))
    assert failure is not None
    assert (failure.rank, failure.error, failure.exit_code) == (1, "ValueError", 1)
    assert "_fail_at_second_call" in failure.traceback
    assert "worker.py" not in failure.traceback
    assert "The recipe's loss was called with (outputs: Tensor float32 (31, 10)" in failure.message
    assert failure.message in failure.traceback
    log = (run.folder / "out/logs/rank1.log").read_text()
    assert failure.traceback.partition("\n")[2] in log
    assert "worker.py" in log


def test_a_rank_of_torchrun_fails(run: Commands) -> None:
    """Under torchrun the failing rank shows its traceback, and the other shows nothing."""
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


def _imports_torch(process: subprocess.Popen[str]) -> bool:
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def _starts_ranks(process: subprocess.Popen[str]) -> bool:
    return bool(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


@pytest.mark.parametrize("stage", [_imports_torch, _starts_ranks])
def test_ctrl_c_before_there_are_steps(
    run: Commands, stage: Callable[[subprocess.Popen[str]], bool]
) -> None:
    """Ctrl-C during the import of torch or the start of the ranks prints one line."""
    process = run.start("launcher", "run", RECIPE, "how=hang", "-n", "2", "--out", "out", cold=True)
    deadline = time.monotonic() + 30
    while not stage(process):
        assert time.monotonic() < deadline, "the stage is never reached"
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == "launcher: stopped by SIGINT"


def test_ctrl_c_twice_ends_a_single_process(run: Commands) -> None:
    """If a step hangs, a second Ctrl-C ends a recipe that runs by itself, and prints one line."""
    process = run.start("python", RECIPE, "how=hang", "--out", "out")
    assert process.stdout is not None
    for line in process.stdout:
        if "hanging" in line:
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # pending signals of one kind are merged
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == "launcher: stopped by SIGINT"


@pytest.mark.parametrize("target", ["launcher", "all"])
def test_a_second_ctrl_c_ends_the_run(run: Commands, target: str) -> None:
    """If a step hangs, a second Ctrl-C, to the launcher or to all processes, ends the run."""
    process = run.start("launcher", "run", RECIPE, "how=hang", "rank=0", "-n", "2", "--out", "out")
    assert process.stdout is not None
    for line in process.stdout:
        if "hanging" in line:
            break
    assert process.stderr is not None
    for _ in range(2):
        if target == "launcher":
            process.send_signal(signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGINT)
        line = next(line for line in process.stderr if line.strip())
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (line + stderr).strip() == "launcher: stopped by SIGINT"
    assert stdout.strip() == ""


def test_ranks_end_with_a_launcher_that_is_killed(run: Commands) -> None:
    """After SIGKILL of the launcher no rank and no DataLoader worker remains."""
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
    assert not drain.is_alive(), "a process still holds the output"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "sleep",
            r"rank 1 .* computing in step 2, at .*failing\.py, line \d+.* other rank waits",
        ),
        ("sleeping-worker", r"is reading data in step \d.* num_workers=0"),
        ("extra", r"different calls, .*rank 1 at .*failing\.py, .*in _extra: "),
        (
            "stopped",
            r"rank 1 .* does not answer: .* \d+ s ago, after \d+ steps?, .* other rank waits",
        ),
    ],
)
def test_a_hang_is_named(run: Commands, how: str, message: str) -> None:
    """The rank for which the others wait is named, the logs hold stacks, and every rank ends."""
    done = fail(run, how, "rank=1")
    assert done.exit_code == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr
    limit = "start:8" if how == "sleeping-worker" else "step:2"  # its first batch is in the trial
    assert f"(hang_timeout={limit})" in done.stderr
    assert re.search(r"last seen: rank 0: step \d, \w+.*; rank 1: step \d", done.stderr)
    logs = [path.read_text() for path in (run.folder / "out/logs").iterdir()]
    assert any("most recent call first" in log for log in logs)
    if how == "sleep":
        assert re.search(r"rank 1 has not made collective call \d+ \(gloo:", done.stderr)
        assert "in _fail_at_second_call" in (run.folder / "out/logs/rank1.log").read_text()


@pytest.mark.parametrize(
    ("phase", "place", "seconds"),
    [
        ("start", r"starting, at .*failing\.py, ", 8),
        ("evaluation", r"evaluating after \d+ steps, at .*failing\.py, ", 3),
        ("save", r"saving after 1 step, at .*failing\.py, ", 4),
    ],
)
def test_each_phase_has_a_limit(run: Commands, phase: str, place: str, seconds: int) -> None:
    """A rank that hangs in a phase ends the run by the limit of that phase alone, and is named."""
    others = {"start", "step", "evaluation", "save"} - {phase}
    limits = ",".join([f"{phase}:{seconds}", *(f"{other}:none" for other in sorted(others))])
    settings = ("rank=1", "checkpoint_every=1", f"hang_timeout={limits}")
    start = time.monotonic()
    done = fail(run, f"hang-{phase}", *settings)
    assert seconds < time.monotonic() - start < seconds + _SECONDS_TO_FAIL
    assert done.exit_code == 1, done.stderr
    assert f"(hang_timeout={phase}:{seconds})" in done.stderr
    assert re.search(rf"rank 1 \(.*\) is {place}", done.stderr), done.stderr


_TIMEOUTS = """
from dataclasses import replace
import torch
from launcher.recipes.digits import digits

def timeouts():
    recipe = digits()

    def loss(outputs, batch):
        from torch.distributed import distributed_c10d

        groups = distributed_c10d._world.pg_map
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        print("TIMEOUTS", *sorted(backend.options._timeout.total_seconds() for backend in backends))
        return recipe.loss(outputs, batch)

    return replace(recipe, name="timeouts", loss=loss)
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero3"])
def test_no_group_ends_calls_before_the_longest_limit(run: Commands, strategy: str) -> None:
    """Each process group, DeepSpeed's own too, has a timeout above the longest limit of a phase."""
    (run.folder / "timeouts.py").write_text(_TIMEOUTS)
    settings = (f"strategy={strategy}", "steps=1", "device=cpu", "hang_timeout=save:7200")
    done = run("launcher", "run", "timeouts.py", *settings, "-n", "2", "--out", "out")
    assert done.exit_code == 0, done.stderr
    log = (run.folder / "out/logs/rank1.log").read_text()
    found = re.findall(r"^TIMEOUTS (.*)$", log, re.MULTILINE)[-1].split()
    assert set(found) == {"7500.0"}
    assert len(found) >= (2 if strategy == "zero1" else 1)


def test_a_bad_step_is_skipped(run: Commands) -> None:
    """A step whose loss is not finite is reported with its samples and skipped."""
    done = fail(run, "nan-once", "rank=1")
    assert done.exit_code == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "Its samples: " in line)
    indices = [int(text) for text in line.partition("Its samples: ")[2].rstrip(".").split(", ")]
    assert len(set(indices)) == 62, "the samples of the global batch, of both ranks"
    rows = read_lines(run.folder / "out/metrics.jsonl")
    bad_steps = [row["step"] for row in rows if "loss" in row and row["loss"] is None]
    assert len(bad_steps) == 1
    weights = load_file(run.folder / "out/model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_too_many_bad_steps_end_the_run(run: Commands) -> None:
    """max_bad_steps bad steps in a row end the run, and the samples of the last are named."""
    done = fail(run, "nan", "checkpoint_every=1", "max_bad_steps=2")
    assert done.exit_code == 1
    assert "(max_bad_steps=2)" in done.stderr
    assert re.search(r"samples of step 2: \d+(, \d+)+", done.stderr)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_stops_no_run(run: Commands) -> None:
    """Failed checkpoints are reported, the last good one stays, and the run takes every step."""
    disk = run.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk], check=False
    )
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        recipe = f"{ROOT / 'tests/recipes/worlds.py'}:worlds"
        done = run(
            *("launcher", "run", recipe, "record_samples=false", "-n", "2", "checkpoint_every=2"),
            *("--out", disk / "out"),
        )
        assert "No space left on device" in done.stdout
        assert "step 15/15" in done.stdout
        assert "Traceback" not in done.stdout + done.stderr
        (newest, *_) = list_checkpoints(RunDir(disk / "out"))
        assert not list(newest.find_damage(newest.read_manifest().files, newest.read_manifest()))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_files_that_may_not_grow_stop_no_run(run: Commands) -> None:
    """Under a limit on file sizes the run takes every step, and reports what it cannot save."""
    recipe = f"{ROOT / 'tests/recipes/worlds.py'}:worlds"
    command = f"ulimit -f 20; launcher run {recipe} -n 2 checkpoint_every=5 --out out"
    done = run("bash", "-c", command)
    assert done.exit_code == 1
    assert "(rank 0: File too large)" in done.stdout
    assert "step 15/15" in done.stdout
    assert "model.safetensors" in done.stderr
    assert "launcher resume" not in done.stderr, "there is nothing to resume from"
    assert list_checkpoints(RunDir(run.folder / "out")) == []
    assert list((run.folder / "out/checkpoints").iterdir()) == [], "nothing half-written"


def test_stopped_with_nothing_saved(run: Commands) -> None:
    """A run that stops and cannot save fails and does not offer to resume."""
    recipe = f"{ROOT / 'tests/recipes/worlds.py'}:worlds"
    command = f"ulimit -f 20; exec launcher run {recipe} epochs=2000 -n 2 --out out"
    process = run.start("bash", "-c", command)
    assert process.stdout is not None
    for line in process.stdout:
        if "samples/s" in line:
            break
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stdout + stderr
    assert "no checkpoint" in stderr
    assert "launcher resume" not in stdout + stderr
