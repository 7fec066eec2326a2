"""Measure the memory that orders of samples and indices of data sets take in a rank.

    python benchmarks/data_memory.py

Claim: the global and the windowed order and a mixture take no memory for each sample, and the
others a few bytes. Each case is built and looked up in a process of its own. The bytes of its
arrays are exact, and those at 10^9 samples follow from them, because every array grows with the
samples; the growth of the resident memory, and its peak while the case was built, are measured.
"""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
from contest import Cell, benchmark, print_table

from launcher import Mixture, Packed, Source, weighted
from launcher.engine.data.order import Order, OrderRequest, order_of
from launcher.engine.data.tar_index import TarIndex

BATCH = 512
LARGE = 10**9
FEWER = 20
"""Packing and indices of tars are measured on this fraction of the samples."""


class Samples:
    """A data set that knows its length, and perhaps its chunks."""

    def __init__(self, count: int, chunk: int | None = None) -> None:
        self.count = count
        if chunk is not None:
            self.chunks = np.full(count // chunk, chunk, np.int32)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return np.zeros(1 + index % 100, np.int64)


def look_up(data: Any, count: int, shuffle: Any = "global", lengths: Any = None) -> Order:
    """Return the order of a data set, after a lookup at many places."""
    request = OrderRequest(
        seed=1, shuffle=shuffle, window=16_384, batch_size=BATCH, total_positions=count
    )
    order = order_of(data, len(data), request, lengths)
    order.elements_at(0, np.linspace(0, count - 1, 64).astype(np.int64))
    return order


def lengths_of(count: int) -> Any:
    """Return lengths as 32-bit numbers."""
    return np.arange(count, dtype=np.int32) % 1000


def balanced(count: int) -> Any:
    """Return data whose 1,000 classes are balanced."""
    groups = lengths_of(count)
    return weighted(Samples(count), 1 / np.bincount(groups)[groups], groups=groups)


def mixture(count: int) -> Mixture:
    """Return three data sets in proportions."""
    shares = (count // 2, count // 3, count - count // 2 - count // 3)
    return Mixture([Source(Samples(each), weight=1) for each in shares], samples=count)


def tar_index(count: int) -> TarIndex:
    """Return the index of tars with two files for each sample."""
    files = 2 * count
    offsets = np.arange(files, dtype=np.int64) * 2048 + 512
    return TarIndex(
        {
            "keys": np.array([f"{number:09}" for number in range(count)], str),
            "starts": np.arange(count + 1, dtype=np.int64) * 2,
            "offsets": offsets % (1 << 30),
            "sizes": np.full(files, 100_000, np.int64),
            "headers": (offsets * 2_654_435_761) % (1 << 32),
            "extensions": np.array(["jpg", "cls"] * count, str),
        }
    )


CASES: dict[str, Callable[[int], Any]] = {
    "shuffle=global": lambda count: look_up(Samples(count), count),
    "shuffle=window, chunks of 1,024": lambda count: look_up(
        Samples(count // 1024 * 1024, 1024), count // 1024 * 1024, "window"
    ),
    "shuffle=window, one sample per file": lambda count: look_up(
        Samples(count, 1), count, "window"
    ),
    "shuffle=length, lengths in 32 bits": lambda count: look_up(
        Samples(count), count, "length", lengths_of(count)
    ),
    "mixture of three": lambda count: look_up(mixture(count), count),
    "weighted by class, its data and its order": lambda count: (
        (data := balanced(count)),
        look_up(data, count),
    ),
    "Packed, about 40 documents a sample": lambda count: vars(
        Packed(Samples(count // FEWER), 1 + np.arange(count // FEWER) % 100, tokens=2048)
    ),
    "Shards, two files a sample": lambda count: tar_index(count // FEWER),
    "a list of (path, class)": lambda count: [
        (f"/data/train/n{number % 1000:04}/{number:09}.jpeg", number % 1000 + 1000)
        for number in range(count)
    ],
    "an array of these paths and one of classes": lambda count: (
        np.array([b"/data/train/n0000/000000000.jpeg"]).repeat(count),
        np.zeros(count, np.int16),
    ),
}
"""What is built for a number of samples."""


def array_bytes(value: Any, seen: set[int] | None = None) -> int:
    """Return the bytes of all arrays that a value holds."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(array_bytes(each, seen) for each in value.values())
    if isinstance(value, (list, tuple)):
        return sum(array_bytes(each, seen) for each in value[:100])
    return array_bytes(getattr(value, "__dict__", {}), seen) if hasattr(value, "__dict__") else 0


def resident(name: str) -> int:
    """Return resident memory of this process in bytes: `VmRSS` now, `VmHWM` at most."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measure(name: str, count: int, connection: Connection) -> None:
    """Build a case and send the bytes of its arrays, the growth of this process and its peak."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    built = CASES[name](count)
    values = (array_bytes(built), resident("VmRSS") - before, resident("VmHWM") - before)
    connection.send(json.dumps(values))


@benchmark
@click.option("--samples", type=click.IntRange(min=1000), default=10**7, show_default=True)
def main(samples: int) -> None:
    """Print the memory of each order and index."""
    context = multiprocessing.get_context("fork")
    rows: list[list[Cell]] = []
    for name in CASES:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(name, samples, sender))
        process.start()
        sender.close()  # so that a case that fails ends the benchmark
        array, growth, peak = json.loads(receiver.recv())
        process.join()
        count = samples // FEWER if name.startswith(("Packed", "Shards")) else samples
        held = array if not name.startswith("a list") else growth
        rows.append(
            [
                name,
                (count, ",.0f"),
                (held / count, ".2f"),
                (array / 1e6, ",.1f"),
                (growth / 1e6, ",.1f"),
                (peak / 1e6, ",.1f"),
                (held / count * LARGE / 1e9, ",.2f"),
            ]
        )
    head = ("what", "samples", "bytes each", "arrays, MB", "growth, MB", "peak, MB", "at 10^9, GB")
    print_table(head, rows)


if __name__ == "__main__":
    main()
