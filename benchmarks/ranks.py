"""More ranks: launcher against plain DDP, and communication against its model.

    python benchmarks/ranks.py

The net of tiny.py, wide enough that its gradients are worth sending, on 1, 2 and 4 gloo ranks, one
thread each: strong scaling shares one batch among them, weak scaling gives each its own. A rank has
a core of its own as long as there are enough: efficiency is samples/s over those of one rank times
min(ranks, cores). Both loops take the same samples in the same order, in turns, and their losses
are compared.

Then communication alone: steps of DDP with and without it on the same processes, and what the
model of `launcher plan --estimate` makes of the same step from the latency and the bandwidth of
all-reduces on these ranks.
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
"""Of strong scaling; weak scaling begins with a quarter of it."""


@benchmark
@click.option("--ranks", type=Numbers(int, 1), default="1,2,4", show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--steps", type=click.IntRange(min=24), default=64, show_default=True)
@click.option("--width", type=click.IntRange(min=1), default=1024, show_default=True)
def main(ranks: list[int], turns: int, steps: int, width: int) -> None:
    """Print throughput, its ratio to plain DDP's, and its efficiency."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        for kind in ("strong", "weak"):
            rows: list[list[Cell]] = []
            alone: dict[str, float] = {}
            for number in ranks:
                batch = BATCH_SIZE if kind == "strong" else BATCH_SIZE // 4 * number
                epochs = steps * batch // TRAIN_SAMPLES
                settings = [f"batch={batch}", f"epochs={epochs}", f"width={width}"]
                rates = measure(number, turns, batch, settings, Path(folder) / kind)
                for name in NAMES:
                    rate = median(rates[name])
                    if number == 1:
                        alone[name] = rate
                    ideal = alone.get(name, 0.0) * min(number, len(cores))
                    rows.append(
                        [
                            str(number),
                            CONTESTANTS[name].title,
                            str(batch),
                            (rate, ",.0f"),
                            (median(map(truediv, rates[name], rates["torch"])), ".3f"),
                            (rate / ideal, ".2f") if ideal else "",
                        ]
                    )
            head = ("ranks", "loop", "batch", "samples/s", "to plain DDP", "efficiency")
            print_table(head, rows, title=f"{kind} scaling, medians of {turns}")
        print_communication([number for number in ranks if number > 1], width, Path(folder))


def measure(
    ranks: int, turns: int, batch: int, settings: list[str], folder: Path
) -> dict[str, list[float]]:
    """Return the samples/s of each loop's turns.

    Raises:
        click.ClickException: They trained something else.
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
    """Print steps with and without communication, and the model's."""
    rows: list[list[Cell]] = []
    for number in ranks:
        out = folder / f"communication-{number}.json"
        command = ["torchrun", "--standalone", "--nproc-per-node", str(number)]
        settings = ["--width", str(width), "--batch-size", str(BATCH_SIZE // number)]
        subprocess.run(
            [BIN / command[0], *command[1:], HERE / "communication.py", *settings, "--out", out],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        found = json.loads(out.read_text())
        link = Link(seconds=found["latency"], bytes_per_second=found["bandwidth"])
        sent = Traffic(ring(found["num_bytes"], number, link), 1)
        model = step_seconds(found["no_sync"], sent, accumulation=1, num_bytes=found["num_bytes"])
        rows.append(
            [
                str(number),
                (1e3 * found["no_sync"], ".2f"),
                (1e3 * found["sync"], ".2f"),
                (1e3 * (found["sync"] - found["no_sync"]), ".2f"),
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
