"""Benchmarks behind the README's figures: each runs in its short form and prints its table."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil

import pytest
from quick import SHORT
from support import ROOT, Commands, Finished, needs_fashion_mnist


def rows(printed: str) -> list[list[str]]:
    """Return the cells of all tables in a Markdown text, without the heads."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    heads = {index - 1 for index, line in enumerate(lines) if line.startswith("|---")}
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for index, line in enumerate(lines)
        if index not in heads and index - 1 not in heads
    ]


def short(run: Commands, name: str, *, warm: bool = True) -> Finished:
    """Run a benchmark in its short form, and check that its file has the printed tables.

    Unless `warm` is false, the commands that it starts are forked from a process with torch.
    """
    file = run.folder / "results" / f"{name}.json"
    script = ROOT / f"benchmarks/{name}.py"
    done = run("python", script, *SHORT[name].split(), "--json", file, warm=warm)
    assert done.exit_code == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert report["machine"]["usable_cores"] >= 1
    assert report["versions"]["torch"]
    assert sum(len(table["rows"]) for table in report["tables"]) == len(rows(done.stdout))
    return done


def test_same_steps(run: Commands) -> None:
    """On two processes launcher takes the steps of one process; a plain PyTorch loop does not."""
    done = short(run, "same_steps")
    table = {(cells[0], cells[1]): cells[2:] for cells in rows(done.stdout)}
    assert table["launcher, fp32, ddp", "2"][:4] == ["12", "128", "=", "="]
    steps, samples, ids, lrs, losses, *_ = table["launcher, fp64, ddp", "2"]
    assert (steps, samples, ids, lrs) == ("12", "128", "=", "=")
    assert float(losses) < 1e-12
    assert table["plain PyTorch loop, 128 per process", "2"][:3] == ["6", "256", "from step 1"]
    assert table["plain PyTorch loop, 64 per process", "2"][:3] == ["12", "128", "from step 1"]


def test_loop_overhead(run: Commands) -> None:
    """The loops have equal losses, and a framework that is not installed is skipped by name."""
    done = short(run, "loop_overhead")
    assert [cells[0] for cells in rows(done.stdout)][:2] == ["plain PyTorch loop", "launcher"]
    assert {cells[-1] for cells in rows(done.stdout)[1:]} == {"0.0e+00"}
    if importlib.util.find_spec("ignite") is None:
        assert "skipped: ignite" in done.stdout
        assert "pytorch-ignite" in done.stdout


def test_recovery(run: Commands) -> None:
    """A run on two nodes goes on after it has lost a rank, and the time is printed."""
    ((lost, seconds),) = rows(short(run, "recovery", warm=False).stdout)
    assert lost == "rank"
    assert 0 < float(seconds) < 120


def test_data(run: Commands) -> None:
    """Each installed format is read by launcher and by its own loader."""
    measured = {cells[0]: cells[2:] for cells in rows(short(run, "data").stdout)}
    assert {"tokens", "sqlite", "images"} <= set(measured)
    assert all(float(cell.replace(",", "")) > 0 for cells in measured.values() for cell in cells)


def test_data_matrix(run: Commands) -> None:
    """Orders, mixtures, packing and streams have the same samples on 1 and 3 ranks, and resumed."""
    for _, _, number, samples, resumed, difference in rows(short(run, "data_matrix").stdout):
        assert (number, samples, resumed) == ("4", "=", "=")
        assert float(difference) < 1e-5


def test_noise_cost(run: Commands) -> None:
    """The table compares steps without and with the noise scale."""
    done = short(run, "noise_cost")
    assert [cells[0] for cells in rows(done.stdout)] == ["without", "with"]
    assert rows(done.stdout)[0][2] == "1.000"


def test_memory_plan(run: Commands) -> None:
    """The table compares the planned with the measured memory of a rank."""
    done = short(run, "memory_plan", warm=False)
    ((strategy, ranks, planned, measured, ratio, start, ratio_at_start),) = rows(done.stdout)
    assert (strategy, ranks) == ("ddp", "2")
    assert float(ratio) == pytest.approx(float(measured) / float(planned), rel=0.01)
    assert float(ratio) == pytest.approx(1.0, abs=0.4)
    assert float(ratio_at_start) == pytest.approx(float(start) / float(planned), rel=0.02)


def test_teardown(run: Commands) -> None:
    """Finished runs exit with 0 under launcher and under torchrun."""
    done = short(run, "teardown", warm=False)
    assert [cells[3:] for cells in rows(done.stdout)] == [["0", "0 x 1"]] * 2


@needs_fashion_mnist
def test_super_convergence(run: Commands) -> None:
    """The table compares a constant learning rate with five others by their accuracies."""
    done = short(run, "super_convergence")
    printed = rows(done.stdout)
    constant, *others = printed[:6]
    assert constant[:3] == ["constant, best lr 0.01", "100", "1.0"]
    assert len(others) == 5
    assert printed[6][2] == "1.0", "the seconds of the constant learning rate"
    assert all(float(cells[3].partition("%")[0]) > 10 for cells in others)


@needs_fashion_mnist
def test_batch_64_to_512(run: Commands) -> None:
    """A larger batch reaches the target accuracy in fewer steps."""
    done = short(run, "batch_64_to_512")
    small, large = rows(done.stdout)
    assert (small[0], large[0]) == ("64", "256")
    assert float(large[3]) > 1
    assert "B_simple" in done.stdout


def test_launch(run: Commands) -> None:
    """The table has times and ratios to torchrun for torchrun and `launcher run`, also warm."""
    done = short(run, "launch", warm=False)
    torchrun, launcher, warm = rows(done.stdout)
    names = [row[0] for row in (torchrun, launcher, warm)]
    assert names == ["torchrun", "launcher run", "launcher run --warm"]
    assert torchrun[2::2] == ["1.00"] * 3
    assert all(float(cell) > 0 for cell in (*launcher[1:], *warm[1:]))


def test_ranks(run: Commands) -> None:
    """The tables compare the throughput of both loops, and communication with its model."""
    done = short(run, "ranks")
    *scaling, communication = rows(done.stdout)
    assert [cells[0] for cells in scaling] == ["2", "2"] * 2
    assert [cells[4] for cells in scaling[::2]] == ["1.000"] * 2
    _, without_communication, with_communication, *_ = map(float, communication)
    assert with_communication > without_communication


def test_commands(run: Commands) -> None:
    """The table has commands of launcher first and those of other launchers last."""
    names = [cells[0] for cells in rows(short(run, "commands", warm=False).stdout)]
    assert names[0] == "launcher --help"
    assert names[-3:] == ["torchrun --help", "accelerate launch --help", "deepspeed --help"]


def test_lr_finder(run: Commands) -> None:
    """The best lr of a recipe is on the grid of factors of 2, and both rules find one."""
    ((name, steps, best, lowest, trainings, _),) = rows(short(run, "lr_finder").stdout)
    assert (name, steps) == ("mlp-digits-adamw-64", "300")
    assert math.log2(float(best) / 0.1) == pytest.approx(round(math.log2(float(best) / 0.1)))
    assert 0 < float(trainings) < float(lowest) * 10


def test_every_benchmark_has_a_short_form(run: Commands) -> None:
    """`make bench` runs every benchmark, names one that fails, and exits with 1."""
    scripts = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if "@benchmark\n" in path.read_text()
    }
    assert set(SHORT) == scripts
    (run.folder / "out").write_text("in the way")
    done = run(
        *("python", ROOT / "benchmarks/quick.py", "--only", "teardown"),
        *("--out", run.folder / "out"),
    )
    assert done.exit_code == 1
    assert "teardown" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs Debian's package strace")
def test_opens(run: Commands) -> None:
    """A rank of launcher makes less than a fifth of the file system calls of one of torchrun."""
    launcher, torchrun = rows(short(run, "opens", warm=False).stdout)
    assert (launcher[0], torchrun[0]) == ("launcher run", "torchrun")
    launcher_calls, torchrun_calls = (
        int(cells[3].replace(",", "")) for cells in (launcher, torchrun)
    )
    assert launcher_calls * 5 < torchrun_calls


def test_gpu(run: Commands) -> None:
    """Without a GPU every check is skipped; on CPU ranks a check is really made."""
    script, file = ROOT / "benchmarks/gpu.py", run.folder / "gpu.json"
    done = run("python", script, "--json", file)
    assert done.exit_code == 0, done.stderr
    assert len(rows(done.stdout)) > 10
    assert all(cells[-1].startswith("skipped: ") for cells in rows(done.stdout))
    done = run(
        "python",
        script,
        "--device",
        "cpu",
        "--only",
        "stopped and resumed,step time,waits of the host",
        warm=True,
    )
    assert done.exit_code == 0, done.stderr
    assert [cells[-1] for cells in rows(done.stdout)] == [
        "passed",
        "tried",
        "skipped: it needs a GPU",
    ]
