"""Measure the cost of noise_scale=true: the time of a step with it over one without, in turns.

    python benchmarks/noise_cost.py

Claim: noise_scale=true costs a few percent at most. It measures one step in twenty. The net of
tiny.py takes a fraction of a millisecond per step, so that the ratio is an upper bound: a larger
net spends more time on the step itself.
"""

from __future__ import annotations

import shutil
import tempfile
from operator import truediv
from pathlib import Path
from statistics import median

import click
from contest import HERE, Cell, benchmark, print_table, train
from tiny import BATCH_SIZE

_CALLS_PER_STEP = 2
"""Forward passes in a step, one per micro-batch; the clock in the net measures passes."""

SETTINGS = {"without": "noise_scale=false", "with": "noise_scale=true"}


@benchmark
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--epochs", type=click.IntRange(min=20), default=60, show_default=True)
def main(ranks: int, turns: int, epochs: int) -> None:
    """Print wall and CPU microseconds per step with and without the noise scale, and the ratios."""
    folder = Path(tempfile.mkdtemp(prefix="noise_cost-"))
    walls: dict[str, list[float]] = {name: [] for name in SETTINGS}
    cpus: dict[str, list[float]] = {name: [] for name in SETTINGS}
    try:
        for turn in range(turns):
            for name in list(SETTINGS) if turn % 2 else list(SETTINGS)[::-1]:
                out, clock = folder / f"{name}-{turn}", folder / "seconds"
                # Two micro-batches: the noise scale needs two parts of a batch, on one rank too.
                half = f"micro_batch_size={BATCH_SIZE // ranks // 2}"
                settings = [f"seconds={clock}", f"epochs={epochs}", half, SETTINGS[name]]
                train(
                    "launcher",
                    str(HERE / "tiny.py"),
                    out,
                    ranks=ranks,
                    settings=settings,
                    options=[],
                )
                wall, cpu = map(float, clock.read_text().split())
                walls[name].append(_CALLS_PER_STEP * wall * 1e6)
                cpus[name].append(_CALLS_PER_STEP * cpu * 1e6)
                clock.unlink()
    finally:
        shutil.rmtree(folder)
    rows: list[list[Cell]] = []
    for name in SETTINGS:
        row: list[Cell] = [name]
        for times in (walls, cpus):
            row.append((median(times[name]), ",.0f"))
            row.append((median(map(truediv, times[name], times["without"])), ".3f"))
        rows.append(row)
    head = ("noise scale", "us a step", "ratio", "CPU us a step", "ratio")
    title = f"{ranks} process{'es' if ranks > 1 else ''}, medians of {turns}"
    print_table(head, rows, title=title)


if __name__ == "__main__":
    main()
