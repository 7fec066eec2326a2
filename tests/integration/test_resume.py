"""A resumed run continues to the sample, on any number of ranks and under any strategy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from matrix import SOURCE_RANKS, Case, resumed
from support import ROOT, Commands, read_lines, train_suite, wait_until

from launcher.checks.prove import TOLERANCES
from launcher.engine.probes.parity import Trace, compare, read_trace
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir

WORLDS = (SOURCE_RANKS, 1, 3, 4)
CASES = [(ranks, source, case) for ranks in WORLDS for source, case in resumed(ranks)]
WORLDS_PY = str(ROOT / "tests/recipes/worlds.py")
STEADY = str(ROOT / "benchmarks/steady.py")


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train every source, and resume each in every way."""
    return train_suite(module_run, "resume", WORLDS)


@pytest.mark.parametrize(
    ("ranks", "source", "case"),
    CASES,
    ids=[f"{ranks}-{source.key}-as-{case.key}" for ranks, source, case in CASES],
)
def test_it_resumes_to_the_sample(trained: Path, ranks: int, source: Case, case: Case) -> None:
    """A resumed run equals an uninterrupted one, to the bit in the same setting, else rounded."""
    uninterrupted = read_trace(RunDir(trained / f"on{SOURCE_RANKS}" / source.key))
    run_dir = RunDir(trained / f"on{ranks}" / f"{source.key}-as-{case.key}")
    resumed_run = read_trace(run_dir)
    assert len(resumed_run.loss) == source.steps
    precision = str(dict(case.options).get("precision", "fp32"))
    difference = compare(uninterrupted, resumed_run, TOLERANCES[precision])
    assert difference.agrees, difference
    if case == source and ranks == SOURCE_RANKS:
        assert is_equal(uninterrupted, resumed_run)
    steps = [row["step"] for row in read_lines(run_dir.metrics) if "loss" in row]
    assert steps == list(range(1, source.steps + 1)), "each step once"


def is_equal(one: Trace, other: Trace) -> bool:
    """Return whether two runs are equal to the bit."""
    return (one.loss, one.grad_norm) == (other.loss, other.grad_norm) and all(
        torch.equal(weight, other.weights[name]) for name, weight in one.weights.items()
    )


@pytest.fixture(scope="module")
def finished(module_run: Commands) -> Path:
    """Return a finished run with checkpoints after 12 of its 15 steps, and at its end."""
    done = module_run(
        *("launcher", "run", f"{WORLDS_PY}:worlds", "-n", "2", "num_workers=4"),
        *("checkpoint_every=4", "--out", "finished"),
    )
    assert done.exit_code == 0, done.stderr
    return module_run.folder / "finished"


@pytest.fixture
def copy(module_run: Commands, finished: Path, request: pytest.FixtureRequest) -> Path:
    """Return a copy of the finished run, which a test may change."""
    target = module_run.folder / "".join(c if c.isalnum() else "-" for c in request.node.name)
    shutil.copytree(finished, target)
    return target


def test_the_command_resumes(module_run: Commands, finished: Path, copy: Path) -> None:
    """`launcher resume` keeps the run's settings, prints changes, and keeps the earlier record."""
    done = module_run("launcher", "resume", copy, "--from", "12", "-n", "1", "strategy=zero1")
    assert done.exit_code == 0, done.stderr
    assert "resumed from step-00000012" in done.stdout
    assert "the learning rate of step" not in done.stdout, "the schedule is the same"
    assert "run.yaml: num_workers=4, checkpoint_every=4" in done.stdout
    assert compare(read_trace(RunDir(finished)), read_trace(RunDir(copy)), 1e-5).agrees
    assert (copy / "checkpoints/step-00000015.set-aside").is_dir(), "nothing is deleted"
    record = yaml.safe_load((copy / "run.yaml").read_text())
    assert record["plan"]["world_size"] == 1
    assert [earlier["plan"]["world_size"] for earlier in record["earlier"]] == [2]
    assert (copy / "result.json").is_file()


def test_a_finished_run_can_be_extended(module_run: Commands, copy: Path) -> None:
    """More epochs continue a finished run from its end; without them it is left unchanged."""
    done = module_run("launcher", "resume", copy)
    assert done.exit_code == 0
    assert "all 15 steps are taken" in done.stdout
    done = module_run("launcher", "resume", copy, "epochs=4", "-n", "1")
    assert done.exit_code == 0, done.stderr
    assert "changed     epochs 3 -> 4" in done.stdout
    assert "20 steps instead of 15" in " ".join(done.stdout.split()), "one_cycle is stretched"
    steps = [row["step"] for row in read_lines(copy / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 21))


def test_another_schedule_is_printed(module_run: Commands, copy: Path) -> None:
    """The printed learning rate of the next step under a longer schedule is the one it takes."""
    done = module_run("launcher", "resume", copy, "--from", "12", "epochs=4", "-n", "1")
    assert done.exit_code == 0, done.stderr
    rows = {row["step"]: row["lr"] for row in read_lines(copy / "metrics.jsonl") if "lr" in row}
    printed = " ".join(done.stdout.split())
    assert f"the learning rate of step 13 is {rows[13]:.3g} instead of" in printed


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        ("flip", "shard-00002-model-00001-of-00001.safetensors: not the bytes that were written"),
        ("cut", "shard-00002-model-00001-of-00001.safetensors: 100 bytes instead of"),
        ("gone", "shard-00002-model-00001-of-00001.safetensors: No such file or directory"),
        ("manifest", "it is not JSON"),
        ("step", "checkpoint.json: the content does not match its own SHA-256"),
        ("fifo", "shard-00002-model-00001-of-00001.safetensors: Not a regular file"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    module_run: Commands, finished: Path, copy: Path, damage: str, fragment: str
) -> None:
    """A damaged checkpoint is named with its damage; --auto resumes from the one before."""
    newest = copy / "checkpoints/step-00000015"
    shard = newest / "shard-00002-model-00001-of-00001.safetensors"
    if damage == "flip":
        flip(shard)
    elif damage == "cut":
        os.truncate(shard, 100)
    elif damage == "gone":
        shard.unlink()
    elif damage == "fifo":
        shard.unlink()
        os.mkfifo(shard)
    elif damage == "step":
        manifest = newest / "checkpoint.json"
        manifest.write_text(manifest.read_text().replace('"step": 15,', '"step": 8,'))
    else:
        (newest / "checkpoint.json").write_text('{"format": 1, "step"')
    (copy / "result.json").unlink()
    done = module_run("launcher", "resume", copy)
    assert done.exit_code == 2, done.stdout
    assert done.stderr.startswith(f"launcher: {newest}")
    assert fragment in done.stderr
    assert "add `--from step-00000012`, or --auto" in done.stderr
    assert "Traceback" not in done.stderr
    done = module_run("launcher", "resume", copy, "--auto")
    assert done.exit_code == 0, done.stderr
    assert "step-00000012" in done.stdout
    assert is_equal(read_trace(RunDir(finished)), read_trace(RunDir(copy)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch_size=31"], "was written with batch_size 62, and the plan has 31"),
        (["seed=1"], "was written with seed 0, and the plan has 1"),
        (["--from", "13"], "no checkpoint '13'. Its checkpoints: step-00000015, step-00000012"),
        (["nothing=1"], "there is no such setting"),
    ],
)
def test_what_cannot_be_resumed_is_refused(
    module_run: Commands, copy: Path, arguments: list[str], message: str
) -> None:
    """What cannot be resumed is refused without a traceback, and the run folder is unchanged."""
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    done = module_run("launcher", "resume", copy, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_another_model_is_refused(module_run: Commands, copy: Path) -> None:
    """A checkpoint is refused if the recipe's model has weights of other names or shapes."""
    changed = module_run.folder / "changed.py"
    changed.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests/recipes')!r})\n"
        "from dataclasses import replace\n"
        "from worlds import worlds\n"
        "from launcher import Recipe\n"
        "def build():\n"
        "    from torch import nn\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "def changed() -> Recipe:\n"
        "    return replace(worlds(), model=build)\n"
    )
    record = yaml.safe_load((copy / "run.yaml").read_text())
    (copy / "run.yaml").write_text(yaml.safe_dump(record | {"recipe": f"{changed}:changed"}))
    done = module_run("launcher", "resume", copy, "--from", "12")
    assert done.exit_code == 2
    assert "6 parameters" in done.stderr
    assert "0.bias" in done.stderr


def test_no_run_folder_is_refused(run: Commands) -> None:
    """A folder that does not exist, or has no run.yaml, is refused."""
    assert "does not exist" in run("launcher", "resume", "nowhere").stderr
    (run.folder / "empty").mkdir()
    assert "it has no run.yaml" in run("launcher", "resume", "empty").stderr
    done = run("python", WORLDS_PY, "--resume", "empty")
    assert done.exit_code == 2
    assert "it has no run.yaml" in done.stderr


@pytest.mark.usefixtures("finished")
def test_an_existing_run_folder_is_refused(module_run: Commands) -> None:
    """`launcher run` into the folder of another run is refused, with the command to resume it."""
    done = module_run("launcher", "run", f"{WORLDS_PY}:worlds", "--out", "finished")
    assert done.exit_code == 2
    assert "`launcher resume finished`" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_stops_at_a_step(run: Commands, number: signal.Signals) -> None:
    """A signal ends the run with a checkpoint and exit code 75, from which it resumes."""
    process = run.start("launcher", "run", STEADY, "-n", "2", "device=cpu", "--out", "out")
    step = stop_after_checkpoint(process, run.folder / "out", number)
    assert process.returncode == 75
    assert (run.folder / f"out/checkpoints/step-{step:08}").is_dir()
    assert not (run.folder / "out/result.json").exists()
    done = run("launcher", "resume", "out", "seconds_per_step=0", "checkpoint_every=20")
    assert done.exit_code == 0, done.stderr
    assert f"resumed from step-{step:08}" in done.stdout


def stop_after_checkpoint(
    process: subprocess.Popen[str], folder: Path, number: signal.Signals
) -> int:
    """Send a signal to a run once it has saved a checkpoint; return the step it stopped after."""
    wait_until(lambda: list_checkpoints(RunDir(folder)), process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert "launcher resume out" in stdout, stderr
    line = next(line for line in stdout.splitlines() if "stopped after step" in line)
    return int(line.partition("stopped after step ")[2].partition(",")[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_imports_is_not_fatal(run: Commands, number: signal.Signals) -> None:
    """A signal while torch is being imported stops the run after its first step."""
    process = run.start("launcher", "run", STEADY, "-n", "2", "device=cpu", "--out", "out")
    assert process.stdout is not None
    assert process.stdout.readline()  # the plan: from here on it imports
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "stopped after step 1, " in stdout


def test_a_recipe_file_stops_and_resumes(run: Commands) -> None:
    """`python recipe.py` stops at a signal, and resumes with --resume."""
    process = run.start("python", STEADY, "device=cpu", "--out", "out")
    step = stop_after_checkpoint(process, run.folder / "out", signal.SIGUSR2)
    assert process.returncode == 75
    done = run("python", STEADY, "device=cpu", "seconds_per_step=0", "--resume", "out")
    assert done.exit_code == 0, done.stderr
    assert f"resumed from step-{step:08}" in done.stdout
    assert json.loads((run.folder / "out/result.json").read_text())["samples"] == 2000


def test_a_failed_rank_is_restarted(run: Commands) -> None:
    """With --max-restarts a run that fails resumes from its newest checkpoint by itself."""
    recipe = str(ROOT / "tests/recipes/failing.py")
    done = run(
        *("launcher", "run", recipe, "how=raise-once", "rank=1", "-n", "2", "--max-restarts", "1"),
        *("checkpoint_every=1", "--out", "out"),
    )
    assert done.exit_code == 0, done.stderr
    assert "resumed from step-00000003" in done.stdout
    assert not (run.folder / "out/failure.json").exists()
    rows = read_lines(run.folder / "out/metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 16))
