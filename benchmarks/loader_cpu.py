"""Measure the CPU time of a sample with several DataLoader settings.

    python benchmarks/loader_cpu.py

Claim: where decoding takes the cores, more workers than cores take more CPU time for a sample. They
read more samples per second only beside other programs, from which they take a share of the cores.
Each setting trains for few and for many steps; the difference is without the start of a run.
"""

from __future__ import annotations

import resource
import shutil
import tempfile
from pathlib import Path
from statistics import median

import click
from contest import HERE, Cell, benchmark, print_table, train
from stores import BATCH_SIZE

SETTINGS = {
    "no workers": ["num_workers=0"],
    "no workers, 2 threads": ["num_workers=0", "worker_threads=2"],
    "1 worker, 2 threads": ["num_workers=1", "worker_threads=2"],
    "2 workers": ["num_workers=2"],
    "4 workers": ["num_workers=4"],
    "16 workers": ["num_workers=16"],
}

FEW = 10
"""Steps of the shorter training."""


def cpu_seconds(settings: list[str], steps: int, out: Path) -> float:
    """Return the CPU time of a training, workers included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    train(
        "launcher",
        f"{HERE / 'stores.py'}:packed",
        out,
        ranks=1,
        settings=[*settings, f"steps={steps}"],
        options=[],
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@benchmark
@click.option("--steps", type=click.IntRange(min=FEW + 1), default=130, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=2, show_default=True)
def main(steps: int, turns: int) -> None:
    """Print the CPU time of a sample for each setting."""
    folder = Path(tempfile.mkdtemp(prefix="loader-cpu-"))
    costs: dict[str, list[float]] = {name: [] for name in SETTINGS}
    try:
        for turn in range(turns):
            for number, (name, settings) in enumerate(SETTINGS.items()):
                few, many = (
                    cpu_seconds(settings, count, folder / f"{number}-{turn}-{count}")
                    for count in (FEW, steps)
                )
                costs[name].append((many - few) / (steps - FEW) / BATCH_SIZE)
    finally:
        shutil.rmtree(folder)
    rows: list[list[Cell]] = [
        [name, (median(values) * 1e3, ".2f")] for name, values in costs.items()
    ]
    print_table(("settings", "CPU ms per sample"), rows, title=f"1 process, medians of {turns}")


if __name__ == "__main__":
    main()
