"""Compare the scaling of launcher with that of plain DDP, and communication with its model.

    python benchmarks/ranks.py

Claim: launcher scales like plain DDP, and the model of `launcher plan --estimate` predicts the
communication of a step. A wide net of tiny.py, whose gradients take time to send, runs on 1, 2 and
4 gloo ranks with one thread each. Strong scaling splits one batch over the ranks; weak scaling
gives each rank a batch of its own. Each rank has a core to itself while there are enough:
efficiency is the throughput over that of one rank times min(ranks, cores). Both loops take the same
samples in the same order, in turns, and the benchmark fails if their losses differ.

The last table shows communication alone: steps of DDP with and without it on the same processes,
and the model's step time, from the measured latency and bandwidth of all-reduces on these ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from operator import truediv
from pathlib import Path
from statistics import median

import click
from contest import BIN, CONTESTANTS, HERE, Cell, Numbers, benchmark, print_table, train
from loop_overhead import TOLERANCE, read_losses
from tiny import TRAIN_SAMPLES

from launcher.analysis.scaling_model import Link, Traffic, ring, step_seconds

NAMES = ("torch", "launcher")
BATCH_SIZE = TRAIN_SAMPLES // 2
"""Global batch size of strong scaling; weak scaling gives each rank a quarter of it."""


@benchmark
@click.option("--ranks", type=Numbers(int, 1), default="1,2,4", show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--steps", type=click.IntRange(min=24), default=64, show_default=True)
@click.option("--width", type=click.IntRange(min=1), default=1024, show_default=True)
def main(ranks: list[int], turns: int, steps: int, width: int) -> None:
    """Print the throughput, its ratio to plain DDP's, and the scaling efficiency."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        for kind in ("strong", "weak"):
            rows: list[list[Cell]] = []
            rate_of_one: dict[str, float] = {}
            for num_ranks in ranks:
                batch = BATCH_SIZE if kind == "strong" else BATCH_SIZE // 4 * num_ranks
                epochs = steps * batch // TRAIN_SAMPLES
                settings = [f"batch={batch}", f"epochs={epochs}", f"width={width}"]
                rates = measure(num_ranks, turns, batch, settings, Path(folder) / kind)
                for name in NAMES:
                    rate = median(rates[name])
                    if num_ranks == 1:
                        rate_of_one[name] = rate
                    ideal = rate_of_one.get(name, 0.0) * min(num_ranks, len(cores))
                    rows.append(
                        [
                            str(num_ranks),
                            CONTESTANTS[name].title,
                            str(batch),
                            (rate, ",.0f"),
                            (median(map(truediv, rates[name], rates["torch"])), ".3f"),
                            (rate / ideal, ".2f") if ideal else "",
                        ]
                    )
            head = ("ranks", "loop", "batch", "samples/s", "to plain DDP", "efficiency")
            print_table(head, rows, title=f"{kind} scaling, medians of {turns}")
        print_communication(
            [num_ranks for num_ranks in ranks if num_ranks > 1], width, Path(folder)
        )


def measure(
    ranks: int, turns: int, batch: int, settings: list[str], folder: Path
) -> dict[str, list[float]]:
    """Return the samples/s of each loop, one value per turn.

    Raises:
        click.ClickException: The losses of the loops differ by more than TOLERANCE.
    """
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(turns):
        losses = {}
        for name in NAMES if turn % 2 else NAMES[::-1]:
            clock = folder.with_suffix(".seconds")
            out = folder / f"{name}-{ranks}-{batch}-{turn}"
            run_dir = train(
                name,
                str(HERE / "tiny.py"),
                out,
                ranks=ranks,
                settings=[f"seconds={clock}", "hidden_layers=2", "warm_up=16", *settings],
                options=["--same-order", "--batch-size", str(batch // ranks)],
                cores=sorted(os.sched_getaffinity(0))[:ranks],
            )
            rates[name].append(batch / float(clock.read_text().split()[0]))
            losses[name] = read_losses(run_dir)
            clock.unlink()
        first = losses["torch"][0]
        gap = max(abs(a - b) for a, b in zip(*losses.values(), strict=True)) / first
        if gap > TOLERANCE:
            raise click.ClickException(f"On {ranks} ranks a loss differs by {gap:.1e}.")
    return rates


def print_communication(ranks: list[int], width: int, folder: Path) -> None:
    """Print the time of a step with and without communication, and the prediction of the model."""
    rows: list[list[Cell]] = []
    for num_ranks in ranks:
        out = folder / f"communication-{num_ranks}.json"
        command = ["torchrun", "--standalone", "--nproc-per-node", str(num_ranks)]
        settings = ["--width", str(width), "--batch-size", str(BATCH_SIZE // num_ranks)]
        subprocess.run(
            [BIN / command[0], *command[1:], HERE / "communication.py", *settings, "--out", out],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        measured = json.loads(out.read_text())
        link = Link(seconds=measured["latency"], bytes_per_second=measured["bandwidth"])
        num_bytes = measured["num_bytes"]
        traffic = Traffic(ring(num_bytes, num_ranks, link), 1)
        model = step_seconds(measured["no_sync"], traffic, accumulation=1, num_bytes=num_bytes)
        rows.append(
            [
                str(num_ranks),
                (1e3 * measured["no_sync"], ".2f"),
                (1e3 * measured["sync"], ".2f"),
                (1e3 * (measured["sync"] - measured["no_sync"]), ".2f"),
                (1e3 * model.best, ".2f"),
                (1e3 * model.worst, ".2f"),
                (1e6 * link.seconds, ".0f"),
                (link.bytes_per_second / 1e9, ".2f"),
            ]
        )
    head = (
        "ranks",
        "ms a step without",
        "with",
        "communication",
        "model: hidden",
        "not hidden",
        "us latency",
        "GB/s",
    )
    print_table(head, rows, title="communication of plain DDP, and its model")


if __name__ == "__main__":
    main()
