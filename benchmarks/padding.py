"""Measure the padding of a batch of documents: padded as they come, by length, and packed.

    python benchmarks/padding.py

Claim: packing, and batches of similar length, leave less than 1 % padding. The documents are the
Python files of the standard library, as bytes, cut into pieces of at most `tokens`, and lengths
drawn from a log-normal distribution, as those of instructions and answers are. The time of packing
is that of one process.
"""

from __future__ import annotations

import time
from typing import Any

import click
import numpy as np
from contest import Cell, benchmark, print_table
from numpy.typing import NDArray

from launcher import Packed
from launcher.engine.data.order import GlobalOrder, LengthOrder, Order
from launcher.recipes.gpt import read_documents

BATCH = 32
WINDOW = 16_384


class Lengths:
    """Documents of which only the lengths are known."""

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        return np.zeros(self.lengths[index], np.int64)


def padding(lengths: NDArray[np.int64], order: Order) -> float:
    """Return the padding of an epoch's batches, each padded to its longest sample."""
    whole = len(lengths) // BATCH * BATCH
    batches = lengths[order.elements_at(0, np.arange(whole))].reshape(-1, BATCH)
    return 1 - float(batches.sum() / (batches.max(axis=1).sum() * BATCH))


@benchmark
@click.option("--tokens", type=click.IntRange(min=16), default=2048, show_default=True)
@click.option("--documents", type=click.IntRange(min=64), default=100_000, show_default=True)
def main(tokens: int, documents: int) -> None:
    """Print the fraction of padding for each way to form batches."""
    library = np.array([len(text) for text in read_documents(None)])
    pieces = np.concatenate([_cut(length, tokens) for length in library.tolist()])
    drawn = np.random.default_rng(0).lognormal(5.5, 1.0, documents)
    sets = {
        "standard library": pieces,
        "log-normal, median 245": drawn.clip(1, tokens).astype(np.int64),
    }
    rows: list[list[Cell]] = []
    for name, lengths in sets.items():
        started = time.perf_counter()
        packed = Packed(Lengths(lengths), tokens=tokens)
        seconds = time.perf_counter() - started
        rows.append(
            [
                name,
                (len(lengths), ",.0f"),
                (packed.waste_unpacked, ".1%"),
                (padding(lengths, GlobalOrder(len(lengths), 0)), ".1%"),
                (padding(lengths, LengthOrder(lengths, WINDOW, BATCH, 0)), ".1%"),
                (packed.waste, ".2%"),
                (seconds, ".2f"),
            ]
        )
    head = (
        "documents",
        "number",
        f"padded to {tokens:,}",
        "to the longest of 32",
        "shuffle=length",
        "packed",
        "seconds to pack",
    )
    print_table(head, rows, title="padding, of all tokens")


def _cut(length: int, tokens: int) -> NDArray[np.int64]:
    whole, rest = divmod(length, tokens)
    return np.array([tokens] * whole + [rest] * (rest > 0), np.int64)


if __name__ == "__main__":
    main()
