"""Measure what virtual ranks and exact sums add to a step.

    python benchmarks/exact_cost.py

Each configuration trains a net from tiny.py with 8 micro-batches in a batch; a clock in the net
measures the micro-steps. Configurations take turns, each turn in another order; a ratio is the
median of the ratios within each turn. All processes use one thread.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from operator import truediv
from pathlib import Path
from statistics import median

import click
from contest import HERE, Cell, Numbers, benchmark, print_table, train
from tiny import TRAIN_SAMPLES

PARTS = 8
CONFIGURATIONS = {
    "accumulation": ("micro_batch_size={micro}",),
    "virtual_ranks=8": (f"virtual_ranks={PARTS}",),
    "virtual_ranks=8 exact=true": (f"virtual_ranks={PARTS}", "exact=true"),
}
SMALL, LARGE = ("width=128", "hidden_layers=1"), ("width=512", "hidden_layers=4")
NETS = {
    "25 thousand weights, batch 352": (352, SMALL),
    "1 million weights, batch 352": (352, LARGE),
    "1 million weights, batch 1,408": (1408, LARGE),
}
"""Samples of a batch, and the net that it trains."""

assert all(TRAIN_SAMPLES % batch_size == 0 for batch_size, _ in NETS.values())
WARM_UP = 64


@benchmark
@click.option("--ranks", type=Numbers(int, 1), default="1,2", show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--epochs", type=click.IntRange(min=8), default=20, show_default=True)
@click.option("--nets", type=click.IntRange(1, len(NETS)), default=len(NETS), show_default=True)
def main(ranks: list[int], turns: int, epochs: int, nets: int) -> None:
    """Print the milliseconds per step of each configuration, and the ratio to the first."""
    folder = Path(tempfile.mkdtemp(prefix="exact_cost-"))
    cores = sorted(os.sched_getaffinity(0))
    try:
        for title, (batch_size, net) in list(NETS.items())[:nets]:
            for num_ranks in ranks:
                times = measure(
                    net, batch_size, num_ranks, turns, epochs, folder, cores[:num_ranks]
                )
                first, *_ = times
                rows: list[list[Cell]] = [
                    [
                        name,
                        f"{median(of):.2f} ({min(of):.2f} - {max(of):.2f})",
                        (median(map(truediv, of, times[first])), ".3f"),
                    ]
                    for name, of in times.items()
                ]
                processes = f"{num_ranks} process{'es' if num_ranks > 1 else ''}"
                print_table(
                    ("configuration", "ms a step", "ratio"),
                    rows,
                    title=f"{title}, {processes}, medians of {turns}",
                )
    finally:
        shutil.rmtree(folder)


def measure(
    net: tuple[str, ...],
    batch_size: int,
    ranks: int,
    turns: int,
    epochs: int,
    folder: Path,
    cores: list[int],
) -> dict[str, list[float]]:
    """Return the milliseconds per step of each configuration, one value for each turn."""
    times: dict[str, list[float]] = {name: [] for name in CONFIGURATIONS}
    names = list(CONFIGURATIONS)
    calls_per_step = PARTS // ranks
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            clock = folder / "seconds"
            out = folder / "run"
            micro = batch_size // PARTS
            train(
                "launcher",
                str(HERE / "tiny.py"),
                out,
                ranks=ranks,
                settings=[
                    f"seconds={clock}",
                    f"epochs={epochs}",
                    f"warm_up={WARM_UP}",
                    f"batch={batch_size // calls_per_step}",
                    f"batch_size={batch_size}",
                    *net,
                    *(setting.format(micro=micro) for setting in CONFIGURATIONS[name]),
                ],
                options=[],
                cores=cores,
            )
            wall, _ = map(float, clock.read_text().split())
            times[name].append(wall * calls_per_step * 1e3)
            clock.unlink()
            shutil.rmtree(out)
    return times


if __name__ == "__main__":
    main()
