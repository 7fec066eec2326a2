"""Digits in Parquet files, local or in a store, with a gate after each checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gated import Gate

from launcher import Data, ParquetRows, Recipe, RemoteCache, main
from launcher.recipes.digits import digits

ROWS = 64
"""Rows of each file."""


def remote_digits(*, files: str, cache: str = "cache", gates: str = "") -> Recipe:
    """Digits from files that are read one after the other.

    Args:
        files: Paths or URLs, separated by spaces.
        cache: Folder for what is downloaded.
        gates: Folder of the gates; without it there are none.
    """
    return replace(
        digits(),
        name="remote_digits",
        data=lambda: build_data(files.split(), cache),
        callbacks=(Gate(gates),) if gates else (),
        shuffle="window",
        shuffle_window=ROWS,
        train_samples=ROWS * len(files.split()),
        checkpoint_every=2,
        batch_size=32,
        epochs=1,
        metrics={},
        in_memory=False,
        num_workers=0,
        device="cpu",
    )


def build_data(files: list[str], cache: str) -> Data:
    """Return the rows of the files, without evaluation data."""
    return Data(train=ParquetRows(files, decode=decode, cache=RemoteCache(folder=cache)))


def decode(row: dict[str, Any]) -> tuple[Any, int]:
    """Return the image (1, 8, 8) and the label of a row."""
    import torch

    return torch.tensor(row["pixels"], dtype=torch.float32).view(1, 8, 8), int(row["label"])


if __name__ == "__main__":
    main(remote_digits)
