"""What a training loop costs beyond the step itself, against a plain PyTorch loop.

    python benchmarks/loop_overhead.py

Every contestant trains the recipe in tiny.py, whose net is so small that the loop is most of a
step: the same samples in the same order, read a batch at once, the same fused optimizer and
schedule. The clock is in the net. Losses are compared before times are. Contestants take turns,
each turn in another order; a ratio is the median of the turns' own.

Between processes on one machine most of a step is waiting for gloo, which differs from run to run
by more than any loop. The CPU time of the thread that trains leaves the waiting out.
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
"""Of a loss, relative to the first. Rounding takes it to 1e-6; Accelerate, which advances a
schedule once for each process, takes it to 2e-4 on 2: the peak of one_cycle falls between steps."""


@benchmark
@click.option("--ranks", type=Numbers(int, 1), default="1,2", show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--epochs", type=click.IntRange(min=20), default=30, show_default=True)
@click.option("--only", type=Names(CONTESTANTS), default=",".join(CONTESTANTS))
def main(ranks: list[int], turns: int, epochs: int, only: list[str]) -> None:
    """Print microseconds per step of each framework, and their ratio to a plain loop's."""
    names = installed(list(dict.fromkeys(["torch", *only])))
    folder = Path(tempfile.mkdtemp(prefix="loop_overhead-"))
    try:
        for number in ranks:
            walls, cpus, gaps = measure(names, number, turns, epochs, folder)
            rows: list[list[Cell]] = []
            for name in names:
                row: list[Cell] = [CONTESTANTS[name].title]
                for times in (walls, cpus):
                    own = sorted(times[name])
                    row.append(f"{median(own):,.0f} ({own[0]:,.0f} - {own[-1]:,.0f})")
                    row.append((median(map(truediv, times[name], times["torch"])), ".2f"))
                rows.append([*row, (gaps[name], ".1e") if name != "torch" else ""])
            head = ("loop", "us a step", "ratio", "CPU us a step", "ratio", "loss differs by")
            title = f"{number} process{'es' if number > 1 else ''}, medians of {turns}"
            print_table(head, rows, title=title)
    finally:
        shutil.rmtree(folder)


def measure(
    names: list[str], ranks: int, turns: int, epochs: int, folder: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]]:
    """Return microseconds per step of each contestant's turns, on the wall and of CPU time.

    And how far its losses differ from the first contestant's.

    Raises:
        click.ClickException: A contestant failed, or trained something else.
    """
    walls: dict[str, list[float]] = {name: [] for name in names}
    cpus: dict[str, list[float]] = {name: [] for name in names}
    gaps: dict[str, float] = {}
    wanted: list[float] = []
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            out = folder / f"{name}-{ranks}-{turn}"
            clock = folder / "seconds"
            run_dir = train(
                name,
                str(HERE / "tiny.py"),
                out,
                ranks=ranks,
                settings=[f"seconds={clock}", f"epochs={epochs}"],
                options=["--same-order", "--batch-size", str(BATCH_SIZE // ranks)],
            )
            wall, cpu = map(float, clock.read_text().split())
            walls[name].append(wall * 1e6)
            cpus[name].append(cpu * 1e6)
            losses = read_losses(run_dir)
            wanted = wanted or losses
            gap = max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) / wanted[0]
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
