"""The benchmarks behind the README's figures: each runs, in a short form, and prints its table."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
from quick import SHORT
from support import ROOT, Commands, Finished, needs_fashion_mnist


def rows(printed: str) -> list[list[str]]:
    """Return the cells of tables in Markdown, without their heads."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    heads = {number - 1 for number, line in enumerate(lines) if line.startswith("|---")}
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for number, line in enumerate(lines)
        if number not in heads and number - 1 not in heads
    ]


def short(run: Commands, name: str) -> Finished:
    """Run a benchmark in its short form; its tables are printed and written alike."""
    file = run.folder / "results" / f"{name}.json"
    script = ROOT / f"benchmarks/{name}.py"
    done = run("python", script, *SHORT[name].split(), "--json", file)
    assert done.exit_code == 0, done.stdout + done.stderr
    said = json.loads(file.read_text())
    assert said["machine"]["usable_cores"] >= 1
    assert said["versions"]["torch"]
    assert sum(len(table["rows"]) for table in said["tables"]) == len(rows(done.stdout))
    return done


def test_same_steps(run: Commands) -> None:
    """On two processes launcher takes the steps of one; the loop that people copy does not."""
    done = short(run, "same_steps")
    found = {(cells[0], cells[1]): cells[2:] for cells in rows(done.stdout)}
    assert found["launcher, fp32, ddp", "2"][:4] == ["12", "128", "=", "="]
    steps, samples, ids, lrs, losses, *_ = found["launcher, fp64, ddp", "2"]
    assert (steps, samples, ids, lrs) == ("12", "128", "=", "=")
    assert float(losses) < 1e-12
    assert found["plain PyTorch loop, 128 per process", "2"][:3] == ["6", "256", "from step 1"]
    assert found["plain PyTorch loop, 64 per process", "2"][:3] == ["12", "128", "from step 1"]


def test_loop_overhead(run: Commands) -> None:
    """The loops take the same steps, and what is not installed is skipped with the reason."""
    done = short(run, "loop_overhead")
    assert [cells[0] for cells in rows(done.stdout)][:2] == ["plain PyTorch loop", "launcher"]
    assert {cells[-1] for cells in rows(done.stdout)[1:]} == {"0.0e+00"}
    if importlib.util.find_spec("ignite") is None:
        assert "skipped: ignite, because pytorch-ignite is not installed" in done.stdout


def test_noise_cost(run: Commands) -> None:
    """Steps with and without the noise scale are compared."""
    done = short(run, "noise_cost")
    assert [cells[0] for cells in rows(done.stdout)] == ["without", "with"]
    assert rows(done.stdout)[0][2] == "1.000"


def test_teardown(run: Commands) -> None:
    """Runs that have finished exit with 0, started by launcher and by torchrun."""
    done = short(run, "teardown")
    assert [cells[3:] for cells in rows(done.stdout)] == [["0", "0 x 1"]] * 2


@needs_fashion_mnist
def test_super_convergence(run: Commands) -> None:
    """Schedules are compared by the steps that they need to one accuracy."""
    done = short(run, "super_convergence")
    constant, *others = rows(done.stdout)
    assert constant[:3] == ["constant, best lr 0.01", "938", "1.0"]
    assert len(others) == 4
    assert all(float(cells[3].partition("%")[0]) > 10 for cells in others)


@needs_fashion_mnist
def test_batch_64_to_512(run: Commands) -> None:
    """Larger batches take fewer steps and more samples to one accuracy."""
    done = short(run, "batch_64_to_512")
    small, large = rows(done.stdout)
    assert (small[0], large[0]) == ("64", "256")
    assert float(large[3]) > 1
    assert "B_simple" in done.stdout


def test_launch(run: Commands) -> None:
    """Launchers are timed to the first step and to the end, with ratios to torchrun's."""
    done = short(run, "launch")
    torchrun, own = rows(done.stdout)
    assert (torchrun[0], own[0]) == ("torchrun", "launcher run")
    assert torchrun[2::2] == ["1.00"] * 3
    assert all(float(cell) > 0 for cell in own[1:])


def test_ranks(run: Commands) -> None:
    """Both loops take the same steps, and communication stands beside its model."""
    done = short(run, "ranks")
    *scaling, communication = rows(done.stdout)
    assert [cells[0] for cells in scaling] == ["2", "2"] * 2
    assert [cells[4] for cells in scaling[::2]] == ["1.000"] * 2
    _, without, together, *_ = map(float, communication)
    assert together > without


def test_commands(run: Commands) -> None:
    """Commands that only look are timed beside those of others."""
    names = [cells[0] for cells in rows(short(run, "commands").stdout)]
    assert names[0] == "launcher --help"
    assert names[-3:] == ["torchrun --help", "accelerate launch --help", "deepspeed --help"]


def test_every_benchmark_has_a_short_form(run: Commands) -> None:
    """`make bench` leaves none out, and says of one that fails that it did."""
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
    assert "failed, see above: teardown" in done.stderr


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs Debian's package strace")
def test_opens(run: Commands) -> None:
    """A rank of launcher's costs the file system little, one of torchrun's an import."""
    own, torchrun = rows(short(run, "opens").stdout)
    assert (own[0], torchrun[0]) == ("launcher run", "torchrun")
    own_each, torchrun_each = (int(cells[3].replace(",", "")) for cells in (own, torchrun))
    assert own_each * 5 < torchrun_each
