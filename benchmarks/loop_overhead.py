"""Measure the overhead of training loops relative to a plain PyTorch loop.

    python benchmarks/loop_overhead.py

Claim: launcher's loop, with its metrics, costs little more than a plain PyTorch loop. Every
contestant trains the recipe in tiny.py, whose net is so small that the loop dominates a step: the
same samples in the same order, a batch per read, the same fused optimizer and schedule. A clock in
the net measures the steps. The benchmark fails if losses differ. Contestants take turns, each turn
in another order; a ratio is the median of the ratios within each turn.

The row `launcher, logging and averaging` logs a number in each step, and keeps an exponential
average of the weights.

With several processes on one machine most of a step is waiting for gloo, and the waiting differs
between runs by more than the loops do. The CPU time of the training thread excludes it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from operator import truediv
from pathlib import Path
from statistics import median

import click
from contest import (
    CONTESTANTS,
    HERE,
    Cell,
    Names,
    Numbers,
    benchmark,
    installed,
    print_table,
    train,
)
from tiny import BATCH_SIZE

from launcher.runs.rundir import RunDir

TOLERANCE = 1e-3
"""Largest accepted difference of a loss, relative to the first loss.

Rounding causes 1e-6. Accelerate advances a schedule once for each process, so that the peak of
one_cycle falls between steps; on 2 processes that causes 2e-4.
"""


AVERAGING = "launcher-averaging"
"""Key of launcher with a logged number and an average of the weights."""

TITLES = {name: each.title for name, each in CONTESTANTS.items()} | {
    AVERAGING: "launcher, logging and averaging"
}


@benchmark
@click.option("--ranks", type=Numbers(int, 1), default="1,2", show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--epochs", type=click.IntRange(min=20), default=30, show_default=True)
@click.option("--only", type=Names(TITLES), default=",".join(TITLES))
def main(ranks: list[int], turns: int, epochs: int, only: list[str]) -> None:
    """Print the microseconds per step of each framework, and the ratio to a plain loop."""
    present = installed(["torch", *(name for name in only if name in CONTESTANTS)])
    names = list(dict.fromkeys([*present, *(name for name in only if name == AVERAGING)]))
    folder = Path(tempfile.mkdtemp(prefix="loop_overhead-"))
    try:
        for num_ranks in ranks:
            walls, cpus, gaps = measure(names, num_ranks, turns, epochs, folder)
            rows: list[list[Cell]] = []
            for name in names:
                row: list[Cell] = [TITLES[name]]
                for times in (walls, cpus):
                    low, middle, high = min(times[name]), median(times[name]), max(times[name])
                    row.append(f"{middle:,.0f} ({low:,.0f} - {high:,.0f})")
                    row.append((median(map(truediv, times[name], times["torch"])), ".2f"))
                rows.append([*row, (gaps[name], ".1e") if name != "torch" else ""])
            head = ("loop", "us a step", "ratio", "CPU us a step", "ratio", "loss differs by")
            title = f"{num_ranks} process{'es' if num_ranks > 1 else ''}, medians of {turns}"
            print_table(head, rows, title=title)
    finally:
        shutil.rmtree(folder)


def measure(
    names: list[str], ranks: int, turns: int, epochs: int, folder: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]]:
    """Train with each contestant and return its times and loss differences.

    Returns:
        Wall time per step in microseconds, one value per turn, by contestant; CPU time per step
        likewise; the largest relative difference of a loss from the first contestant's.

    Raises:
        click.ClickException: A contestant failed, or its losses differ by more than TOLERANCE.
    """
    walls: dict[str, list[float]] = {name: [] for name in names}
    cpus: dict[str, list[float]] = {name: [] for name in names}
    gaps: dict[str, float] = {}
    reference: list[float] = []
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            out = folder / f"{name}-{ranks}-{turn}"
            clock = folder / "seconds"
            further = ["logs=true", "averaging=ema()"] if name == AVERAGING else []
            run_dir = train(
                "launcher" if name == AVERAGING else name,
                str(HERE / "tiny.py"),
                out,
                ranks=ranks,
                settings=[f"seconds={clock}", f"epochs={epochs}", *further],
                options=["--same-order", "--batch-size", str(BATCH_SIZE // ranks)],
            )
            wall, cpu = map(float, clock.read_text().split())
            walls[name].append(wall * 1e6)
            cpus[name].append(cpu * 1e6)
            losses = read_losses(run_dir)
            reference = reference or losses
            gap = max(abs(a - b) for a, b in zip(losses, reference, strict=True)) / reference[0]
            if gap > TOLERANCE:
                raise click.ClickException(f"{name} on {ranks}: a loss differs by {gap:.1e}.")
            gaps[name] = max(gaps.get(name, 0.0), gap)
            clock.unlink()
            shutil.rmtree(out)
    return walls, cpus, gaps


def read_losses(run_dir: RunDir) -> list[float]:
    """Return the loss of each step."""
    rows = map(json.loads, run_dir.metrics.read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


if __name__ == "__main__":
    main()
