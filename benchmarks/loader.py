"""Compare fixed numbers of DataLoader workers with the number that `launcher find loader` finds.

    python benchmarks/loader.py

Claim: what `launcher find loader` finds comes close to the best fixed number of workers. The
recipes read from two stores: a server on loopback that answers after 10 ms, and JPEGs that take CPU
time to decode. Each number of workers is a training of its own, in turns; its throughput is
measured over the steps after the prefetched batches have been consumed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
from contest import BIN, HERE, Cell, Names, Numbers, benchmark, print_table, train
from stores import BATCH_SIZE

from launcher.planning.loading import PREFETCH_FACTOR

STORES = ("far", "packed")
"""The recipes of stores.py."""


@benchmark
@click.option("--workers", type=Numbers(int, 0), default="0,1,2,4,8,16", show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.5), default=6.0, show_default=True)
@click.option("--delay", type=click.FloatRange(min=0), default=0.01, show_default=True)
@click.option("--stores", type=Names(STORES), default=",".join(STORES), show_default=True)
def main(
    workers: list[int], ranks: int, turns: int, seconds: float, delay: float, stores: list[str]
) -> None:
    """Print samples/s with each number of workers, and with the number that was found."""
    folder = Path(tempfile.mkdtemp(prefix="loader-"))
    head = ("store", "workers per rank", "samples/s", "to 0 workers", "to the best fixed")
    try:
        with object_store(delay) as port:
            numbers = sorted({0, *workers})
            titles = {"far": f"answers after {delay * 1e3:g} ms", "packed": "takes work to decode"}
            settings = {"far": [f"port={port}"], "packed": []}
            measured: Iterator[list[Cell]] = (
                [titles[name], *cells]
                for name in stores
                for cells in Store(name, settings[name], ranks, seconds, folder / name).rows(
                    numbers, turns
                )
            )
            title = f"{ranks} process{'es' if ranks > 1 else ''}, medians of {turns}"
            print_table(head, measured, title=title)
    finally:
        shutil.rmtree(folder)


class Store:
    """Recipe of one store, trained with several numbers of workers."""

    def __init__(
        self, recipe: str, settings: list[str], ranks: int, seconds: float, folder: Path
    ) -> None:
        self._recipe, self._settings = f"{HERE / 'stores.py'}:{recipe}", settings
        self._ranks, self._seconds, self._folder = ranks, seconds, folder

    def rows(self, workers: list[int], turns: int) -> Iterator[list[Cell]]:
        """Run the finder and the trainings, and yield a row for each number of workers."""
        search = self._find()
        found: dict[str, Any] = search["settings"]
        expected = search["best"]["samples_per_second"]
        seen = {each["workers"]: each["samples_per_second"] for each in search["readings"][::-1]}
        rates: dict[str, list[float]] = {}
        for turn in range(turns):
            order = [*((str(number), {"num_workers": number}) for number in workers)]
            order.append(("found", found))
            for name, chosen in order if turn % 2 else order[::-1]:
                number = chosen["num_workers"]
                rate = self._samples_per_second(
                    chosen,
                    expected if name == "found" else seen.get(number, expected),
                    self._folder / f"{name}-{turn}",
                )
                rates.setdefault(name, []).append(rate)
        speeds = {name: median(values) for name, values in rates.items()}
        best = max(speeds[str(number)] for number in workers)
        for name in [*map(str, workers), "found"]:
            speed = speeds[name]
            listed = " ".join(f"{key}={value}" for key, value in found.items())
            title = f"{listed}, by find loader" if name == "found" else name
            yield [title, (speed, ",.0f"), (speed / speeds["0"], ".2f"), (speed / best, ".2f")]

    def _find(self) -> dict[str, Any]:
        command = ["find", "loader", self._recipe, "-n", str(self._ranks), "device=cpu", "--json"]
        process = subprocess.run(
            [str(BIN / "launcher"), *command, *self._settings, "--out", str(self._folder)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        search: dict[str, Any] = json.loads(process.stdout)
        return search

    def _samples_per_second(self, loader: dict[str, Any], expected: float, out: Path) -> float:
        """Train for about the requested seconds and return the throughput in samples/s."""
        # The first steps consume batches that the workers prefetched before the clock started.
        prefetched_steps = 2 + loader["num_workers"] * loader.get(
            "prefetch_factor", PREFETCH_FACTOR
        )
        steps = prefetched_steps + max(int(self._seconds * expected / BATCH_SIZE), 2)
        run_dir = train(
            "launcher",
            self._recipe,
            out,
            ranks=self._ranks,
            settings=[
                *self._settings,
                *(f"{name}={value}" for name, value in loader.items()),
                f"steps={steps}",
            ],
            options=[],
        )
        rows = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
        steady = [row for row in rows if row["step"] > prefetched_steps and "loss" in row]
        seconds = [BATCH_SIZE / float(row["samples_per_second"]) for row in steady]
        return BATCH_SIZE * len(steady) / sum(seconds)


@contextmanager
def object_store(delay: float) -> Iterator[int]:
    """Run the server of stores.py and yield its port."""
    command = [sys.executable, str(HERE / "stores.py"), "--delay", str(delay)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline())
        finally:
            server.kill()


if __name__ == "__main__":
    main()
