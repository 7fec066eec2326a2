"""Time a training on idle and on busy cores, with the spinning of libgomp and with launcher's.

    python benchmarks/busy_cores.py

Claim: the threads of a rank that wait for each other keep a core from the thread that they wait
for, if another program uses the cores too. launcher lets them spin for a shorter time
(GOMP_SPINCOUNT), which costs nothing on idle cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import click
from contest import Cell, benchmark, print_table, train

SPINS = {"libgomp's default": "300000", "launcher's": None}
"""GOMP_SPINCOUNT; None leaves it to launcher."""


@benchmark
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True)
def main(turns: int, steps: int) -> None:
    """Print the seconds of a training of fashion_mnist on one rank that has all cores."""
    seconds: dict[tuple[str, str], list[float]] = {}
    folder = Path(tempfile.mkdtemp(prefix="busy_cores-"))
    try:
        for _ in range(turns):
            for cores, programs in {"idle": 0, "busy": len(os.sched_getaffinity(0))}.items():
                for name, spins in SPINS.items():
                    with busy(programs), spinning(spins):
                        took = train_once(folder / "run", steps)
                    seconds.setdefault((cores, name), []).append(took)
    finally:
        shutil.rmtree(folder)
    rows: list[list[Cell]] = []
    for (cores, name), times in seconds.items():
        base = median(seconds[cores, next(iter(SPINS))])
        rows.append([cores, name, (median(times), ".1f"), (median(times) / base, ".2f")])
    head = ("cores", "spinning", "seconds", "ratio")
    title = f"{steps} steps of fashion_mnist on {os.cpu_count()} cores, medians of {turns}"
    print_table(head, rows, title=title)


def train_once(folder: Path, steps: int) -> float:
    """Return the seconds of a training."""
    settings = [f"steps={steps}", f"evaluate_every={10**9}"]
    run_dir = train("launcher", "fashion_mnist", folder, ranks=1, settings=settings, options=[])
    took: float = json.loads(run_dir.result.read_text())["seconds"]
    shutil.rmtree(folder)
    return took


@contextlib.contextmanager
def busy(programs: int) -> Iterator[None]:
    """Let other programs compute on as many cores."""
    command = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(command) for _ in range(programs)]
    try:
        yield
    finally:
        for program in started:
            program.kill()
            program.wait()


@contextlib.contextmanager
def spinning(count: str | None) -> Iterator[None]:
    """Set GOMP_SPINCOUNT, or leave it out."""
    before = os.environ.pop("GOMP_SPINCOUNT", None)
    if count is not None:
        os.environ["GOMP_SPINCOUNT"] = count
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)
        if before is not None:
            os.environ["GOMP_SPINCOUNT"] = before


if __name__ == "__main__":
    main()
