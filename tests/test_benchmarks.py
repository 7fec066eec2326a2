"""The benchmarks behind the README's figures: each runs, in a short form, and prints its table."""

from __future__ import annotations

import importlib.util

from support import ROOT, Commands, needs_fashion_mnist


def rows(printed: str) -> list[list[str]]:
    """Return the cells of a table in Markdown, without its head."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


def test_same_steps(run: Commands) -> None:
    """On two processes launcher takes the steps of one; the loop that people copy does not."""
    done = run(
        *("python", ROOT / "benchmarks/same_steps.py", "--worlds", "1,2", "--epochs", "1"),
        *("--strategies", "ddp", "--only", "launcher,torch"),
    )
    assert done.exit_code == 0, done.stdout + done.stderr
    found = {(cells[0], cells[1]): cells[2:] for cells in rows(done.stdout)}
    assert found["launcher, fp32, ddp", "2"][:4] == ["12", "128", "=", "="]
    steps, samples, ids, lrs, losses, *_ = found["launcher, fp64, ddp", "2"]
    assert (steps, samples, ids, lrs) == ("12", "128", "=", "=")
    assert float(losses) < 1e-12
    assert found["plain PyTorch loop, 128 per process", "2"][:3] == ["6", "256", "from step 1"]
    assert found["plain PyTorch loop, 64 per process", "2"][:3] == ["12", "128", "from step 1"]


def test_loop_overhead(run: Commands) -> None:
    """The loops take the same steps, and what is not installed is skipped with the reason."""
    done = run(
        *("python", ROOT / "benchmarks/loop_overhead.py", "--ranks", "1", "--turns", "1"),
        *("--epochs", "20", "--only", "launcher,ignite"),
    )
    assert done.exit_code == 0, done.stdout + done.stderr
    assert [cells[0] for cells in rows(done.stdout)][:2] == ["plain PyTorch loop", "launcher"]
    assert {cells[-1] for cells in rows(done.stdout)[1:]} == {"0.0e+00"}
    if importlib.util.find_spec("ignite") is None:
        assert "skipped: ignite, because pytorch-ignite is not installed" in done.stdout


def test_noise_cost(run: Commands) -> None:
    """Steps with and without the noise scale are compared."""
    done = run(
        *("python", ROOT / "benchmarks/noise_cost.py", "--ranks", "1", "--turns", "1"),
        *("--epochs", "20"),
    )
    assert done.exit_code == 0, done.stdout + done.stderr
    assert [cells[0] for cells in rows(done.stdout)] == ["without", "with"]
    assert rows(done.stdout)[0][2] == "1.000"


def test_teardown(run: Commands) -> None:
    """Runs that have finished exit with 0, started by launcher and by torchrun."""
    done = run("python", ROOT / "benchmarks/teardown.py", "--runs", "2", "--ranks", "2")
    assert done.exit_code == 0, done.stdout + done.stderr
    assert [cells[3:] for cells in rows(done.stdout)] == [["0", "0 x 1"]] * 2


@needs_fashion_mnist
def test_super_convergence(run: Commands) -> None:
    """Schedules are compared by the steps that they need to one accuracy."""
    done = run(
        *("python", ROOT / "benchmarks/super_convergence.py", "--epochs", "1", "--seeds", "1"),
        *("--budgets", "100", "--constant-lrs", "0.01", "--peak-lrs", "0.1"),
        *("--find-steps", "20"),
    )
    assert done.exit_code == 0, done.stdout + done.stderr
    constant, *others = rows(done.stdout)
    assert constant[:3] == ["constant, best lr 0.01", "938", "1.0"]
    assert len(others) == 4
    assert all(float(cells[3].partition("%")[0]) > 10 for cells in others)


@needs_fashion_mnist
def test_batch_64_to_512(run: Commands) -> None:
    """Larger batches take fewer steps and more samples to one accuracy."""
    done = run(
        *("python", ROOT / "benchmarks/batch_64_to_512.py", "--batches", "64,256"),
        *("--target", "0.6", "--seeds", "1", "--samples", "12000", "--lrs", "0.03"),
        *("--noise-steps", "60"),
    )
    assert done.exit_code == 0, done.stdout + done.stderr
    small, large = rows(done.stdout)
    assert (small[0], large[0]) == ("64", "256")
    assert float(large[3]) > 1
    assert "B_simple" in done.stdout
