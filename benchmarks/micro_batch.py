"""Compare what `launcher find batch` predicts of its micro-batch with a run that takes it.

    python benchmarks/micro_batch.py

Question: does a run with the recommended `micro_batch_size` have the throughput and the peak memory
that the search measured in a few steps? Each run trains the recipe's own global batch, without
evaluations in between. Its throughput is that of all steps after the first tenth. Its peak memory
is the resident memory of the rank that uses most, as metrics.jsonl records it.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import click
from contest import Cell, Names, Numbers, benchmark, print_table, train
from trainings import AT_THE_END, measure

from launcher.runs.history import History
from launcher.runs.rundir import RunDir

MIB = 1 << 20

_WARM_UP = 0.1
"""Part of a run's steps that is left out, because the first steps are slow."""


class Workload(NamedTuple):
    """A recipe, and how it is searched."""

    recipe: str
    """The recipe as the command line names it."""

    settings: tuple[str, ...]
    """Overrides, as name=value."""

    memory: str
    """Memory limit of a rank."""


WORKLOADS = {
    "digits": Workload("digits", (), "8GiB"),
    "fashion_mnist": Workload("fashion_mnist", ("batch_size=1024",), "8GiB"),
    "tabular": Workload("tabular", ("batch_size=4096",), "8GiB"),
    "gpt": Workload("gpt", ("batch_size=64",), "8GiB"),
    "gpt-little-memory": Workload("gpt", ("batch_size=64",), "800MiB"),
}


@benchmark
@click.option("--workloads", type=Names(WORKLOADS), default=",".join(WORKLOADS), show_default=True)
@click.option("--ranks", type=Numbers(int, 1), default="1,2", show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.1),
    default=15.0,
    show_default=True,
    help="Predicted duration of each run.",
)
def main(workloads: list[str], ranks: list[int], seconds: float) -> None:
    """Print the predicted and the measured throughput and peak memory of each workload."""
    head = ["workload", "ranks", "batch", "micro-batch", "predicted samples/s", "measured", "ratio"]
    head += ["predicted MiB", "measured", "ratio"]
    rows = (compare(name, count, seconds) for name in workloads for count in ranks)
    print_table(head, rows)


def compare(name: str, ranks: int, seconds: float) -> list[Cell]:
    """Search for the micro-batch of a workload, train with it, and return a row of the table."""
    workload = WORKLOADS[name]
    found = measure(
        *("find", "batch", workload.recipe, *workload.settings),
        *("--memory", workload.memory, "--fresh"),
        ranks=ranks,
    )
    size = found["settings"]["micro_batch_size"]
    (trial,) = (trial for trial in found["trials"] if trial["size"] == size)
    batch = found["share"] * ranks
    steps = max(math.ceil(seconds * trial["samples_per_second"] / batch), 10)
    settings = (*workload.settings, f"micro_batch_size={size}", f"steps={steps}", AT_THE_END)
    folder = Path(tempfile.mkdtemp(prefix="micro_batch-"))
    try:
        run = train(
            "launcher", workload.recipe, folder / "run", ranks=ranks, settings=settings, options=()
        )
        throughput, peak = read_run(run)
    finally:
        shutil.rmtree(folder)
    row: list[Cell] = [name, str(ranks), f"{batch:,}", f"{size:,}"]
    predictions = (trial["samples_per_second"], throughput), (trial["peak_bytes"] / MIB, peak / MIB)
    for predicted, measured in predictions:
        row += [(predicted, ",.0f"), (measured, ",.0f"), (predicted / measured, ".2f")]
    return row


def read_run(run: RunDir) -> tuple[float, int]:
    """Return samples per second and the peak memory in bytes that a run has recorded."""
    history = History(run)
    samples, rates = history.steps["samples"], history.steps["samples_per_second"]
    first = math.ceil(_WARM_UP * len(rates))
    counts = [after - before for before, after in pairwise(samples)][first:]
    seconds = sum(count / rate for count, rate in zip(counts, rates[first + 1 :], strict=True))
    return sum(counts) / seconds, max(max(shares.memory_bytes) for shares in history.ranks)


if __name__ == "__main__":
    main()
