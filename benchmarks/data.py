"""Compare the launcher's data sets of stored formats with the formats' own loaders.

    python benchmarks/data.py

Claim: in shuffled reading, a data set of the launcher reads at least 0.9 times as many samples per
second as the format's own loader. Both read the same files on the local disk in batches, in this
process, without collation. The sides alternate; the figures are medians. A loader whose library is
not installed is left out.

Hugging Face `datasets`, `numpy.memmap`, LMDB and SQLite read any sample. WebDataset, MosaicML
Streaming and LitData shuffle what they stream, in an order that depends on the number of processes.
Images are JPEGs of 128 x 128 pixels, a tenth as many as other samples; the plain data set opens
them with Pillow, and a DataLoader without workers reads both.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from contest import Cell, Names, benchmark, print_table

from launcher import (
    ImageFolder,
    LitShards,
    LMDBSamples,
    MosaicShards,
    ParquetRows,
    Shards,
    SQLiteRows,
    TokenFiles,
)
from launcher.console.echo import echo

Read = Callable[[], int]
"""Reads samples and returns their number."""

BATCH_SIZE = 32
FLOATS = 256
BLOCK = 1024
SIDE = 128
FORMATS = (
    *("parquet", "arrow", "tokens", "tar", "mds", "lit"),
    *("lmdb", "sqlite", "images"),
)


@benchmark
@click.option("--samples", type=click.IntRange(min=1_000), default=20_000, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=7, show_default=True)
@click.option(
    "--formats",
    type=Names(FORMATS),
    default=",".join(FORMATS),
    show_default=True,
)
def main(samples: int, turns: int, formats: list[str]) -> None:
    """Print samples/s of each data set and of the format's own loader."""
    folder = Path(tempfile.mkdtemp(prefix="data-"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    head = ("format", "own loader", "launcher", "own loader's", "ratio")
    try:
        rows: Iterator[list[Cell]] = (
            row for name in formats for row in compare(name, folder / name, samples, turns)
        )
        print_table(head, rows, title=f"samples/s, shuffled, medians of {turns} turns")
    finally:
        shutil.rmtree(folder)


def compare(name: str, folder: Path, samples: int, turns: int) -> Iterator[list[Cell]]:
    """Measure a format, and yield its row unless the library is missing."""
    folder.mkdir()
    try:
        loader, ours, theirs = SIDES[name](folder, samples)
    except ImportError as error:
        echo(f"{name} is left out: {error}", err=True)
        return
    rates: dict[Read, list[float]] = {ours: [], theirs: []}
    for turn in range(turns + 1):
        for read in (ours, theirs) if turn % 2 else (theirs, ours):
            start = time.perf_counter()
            count = read()
            if turn:  # the first turn opens files and fills the page cache
                rates[read].append(count / (time.perf_counter() - start))
    mine, other = median(rates[ours]), median(rates[theirs])
    yield [name, loader, (mine, ",.0f"), (other, ",.0f"), (mine / other, ".2f")]


def in_batches(dataset: Any, samples: int) -> Read:
    """Return a function that reads samples in a shuffled order, in batches."""
    order = list(range(len(dataset)))
    random.Random(0).shuffle(order)
    order = order[:samples]
    get = getattr(dataset, "__getitems__", None)

    def read() -> int:
        for start in range(0, len(order), BATCH_SIZE):
            indices = order[start : start + BATCH_SIZE]
            if get is not None:
                get(indices)
            else:
                for index in indices:
                    dataset[index]
        return len(order)

    return read


def iterated(make: Callable[[], Any]) -> Read:
    """Return a function that reads one epoch of a stream."""
    return lambda: sum(1 for _ in make())


def values(index: int) -> np.ndarray[Any, Any]:
    """Return the numbers of a sample, of shape (FLOATS,)."""
    return np.full(FLOATS, index, np.float32)


def table(samples: int) -> Any:
    """Return an Arrow table of numbers, text and arrays."""
    import pyarrow as pa

    numbers = np.repeat(np.arange(samples, dtype=np.float32), FLOATS)
    return pa.table(
        {
            "x": pa.FixedSizeListArray.from_arrays(numbers, FLOATS),
            "y": np.arange(samples),
            "text": [f"sample {index}" for index in range(samples)],
        }
    )


def parquet(folder: Path, samples: int) -> tuple[str, Read, Read]:
    """Compare rows of a Parquet file with Hugging Face's copy of it in Arrow."""
    import datasets
    import pyarrow.parquet as pq

    datasets.disable_progress_bars()
    path = folder / "data.parquet"
    pq.write_table(table(samples), path, row_group_size=2_000)
    other = datasets.Dataset.from_parquet(str(path), cache_dir=str(folder / "hf"))
    sides = in_batches(ParquetRows(path), samples), in_batches(other.with_format("numpy"), samples)
    return "datasets, numpy", *sides


def arrow(folder: Path, samples: int) -> tuple[str, Read, Read]:
    """Compare rows of Arrow files with Hugging Face's own reading of them."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(table(samples)).save_to_disk(folder / "data")
    other = datasets.load_from_disk(str(folder / "data")).with_format("torch")
    files = sorted((folder / "data").glob("*.arrow"))
    return "datasets, torch", in_batches(ParquetRows(files), samples), in_batches(other, samples)


def tokens(folder: Path, samples: int) -> tuple[str, Read, Read]:
    """Compare blocks of tokens with nanoGPT's way to read them from a memory map."""
    path = folder / "train.bin"
    generator = np.random.default_rng(0)
    path.write_bytes(generator.integers(0, 50_000, samples * BLOCK + 1, np.uint16).tobytes())

    class Mapped:
        def __len__(self) -> int:
            return samples

        def __getitems__(self, indices: list[int]) -> list[Any]:
            data = np.memmap(path, np.uint16, "r")  # once per batch, as nanoGPT does
            starts = [index * BLOCK for index in indices]
            return [
                (
                    data[start : start + BLOCK].astype(np.int64),
                    data[start + 1 : start + 1 + BLOCK].astype(np.int64),
                )
                for start in starts
            ]

    ours = TokenFiles(path, block=BLOCK, token_type="uint16")
    return "numpy.memmap", in_batches(ours, samples), in_batches(Mapped(), samples)


def tar(folder: Path, samples: int) -> tuple[str, Read, Read]:
    """Compare samples in tars with WebDataset, which shuffles 1,000 samples at a time."""
    import webdataset

    for shard, start in enumerate(range(0, samples, 1_000)):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as archive:
            for index in range(start, min(start + 1_000, samples)):
                for extension, content in (
                    ("x", values(index).tobytes()),
                    ("y", str(index).encode()),
                ):
                    member = tarfile.TarInfo(f"{index:08}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    files = [str(path) for path in sorted(folder.glob("*.tar"))]

    def stream() -> Any:
        return webdataset.WebDataset(files, shardshuffle=len(files), seed=0).shuffle(1_000)

    return "webdataset", in_batches(Shards(files), samples), iterated(stream)


def mds(folder: Path, samples: int) -> tuple[str, Read, Read]:
    """Compare samples in MDS with MosaicML's data set, read by index."""
    import streaming

    data = folder / "data"
    columns = {"x": f"ndarray:float32:{FLOATS}", "y": "int"}
    with streaming.MDSWriter(out=str(data), columns=columns, size_limit=1 << 20) as writer:
        for index in range(samples):
            writer.write({"x": values(index), "y": index})
    other = streaming.StreamingDataset(local=str(data), batch_size=BATCH_SIZE)
    return "streaming", in_batches(MosaicShards(data), samples), in_batches(other, samples)


def lit(folder: Path, samples: int) -> tuple[str, Read, Read]:
    """Compare samples of LitData's format with its data set, shuffled."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    data = folder / "data"
    writer = BinaryWriter(str(data), chunk_bytes=1 << 20)
    for index in range(samples):
        writer[index] = {"x": values(index), "y": index}
    writer.done()
    writer.merge()
    other = StreamingDataset(str(data), shuffle=True)
    return "litdata", in_batches(LitShards(data), samples), iterated(lambda: other)


def lmdb(folder: Path, samples: int) -> tuple[str, Read, Read]:
    """Compare values in LMDB with the library's own reading, one transaction for a batch."""
    import lmdb

    for name in ("ours", "theirs"):  # a process can open an environment only once
        written = lmdb.open(str(folder / name), map_size=1 << 33)
        with written, written.begin(write=True) as transaction:
            for index in range(samples):
                transaction.put(b"%08d" % index, values(index).tobytes())
    environment = lmdb.open(str(folder / "theirs"), readonly=True, lock=False, readahead=False)

    class Plain:
        def __len__(self) -> int:
            return samples

        def __getitems__(self, indices: list[int]) -> list[Any]:
            with environment.begin() as transaction:
                found = [transaction.get(b"%08d" % index) for index in indices]
            return [np.frombuffer(value, np.float32) for value in found if value is not None]

    ours = LMDBSamples(folder / "ours", decode=lambda _, value: np.frombuffer(value, np.float32))
    return "lmdb", in_batches(ours, samples), in_batches(Plain(), samples)


def sqlite(folder: Path, samples: int) -> tuple[str, Read, Read]:
    """Compare rows of SQLite with a cursor that selects one row after the other."""
    path = folder / "data.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE samples (x BLOB, y INTEGER)")
        rows = ((values(index).tobytes(), index) for index in range(samples))
        database.executemany("INSERT INTO samples VALUES (?, ?)", rows)
    database.close()
    cursor = sqlite3.connect(path).cursor()

    class Plain:
        def __len__(self) -> int:
            return samples

        def __getitem__(self, index: int) -> Any:
            cursor.execute("SELECT x, y FROM samples WHERE rowid = ?", (index + 1,))
            x, y = cursor.fetchone()
            return {"x": np.frombuffer(x, np.float32), "y": y}

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        return {"x": np.frombuffer(row["x"], np.float32), "y": row["y"]}

    ours = SQLiteRows(path, "samples", decode=decode)
    return "sqlite3 cursor", in_batches(ours, samples), in_batches(Plain(), samples)


def images(folder: Path, samples: int) -> tuple[str, Read, Read]:
    """Compare images in folders with a data set that opens the same files with Pillow."""
    from PIL import Image
    from torch.utils.data import DataLoader

    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize((SIDE, SIDE))
    for index in range(samples // 10):
        path = folder / f"class{index % 10}" / f"{index:06}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.save(path)

    class Plain:
        files = sorted(folder.glob("*/*.jpg"))

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> Any:
            with Image.open(self.files[index]) as image:
                return np.asarray(image.convert("RGB")), int(self.files[index].parent.name[5:])

    def loaded(dataset: Any) -> Read:
        loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, collate_fn=list)
        return lambda: sum(len(batch) for batch in loader)

    return "Pillow", loaded(ImageFolder(folder, transform=np.asarray)), loaded(Plain())


SIDES = {
    "parquet": parquet,
    "arrow": arrow,
    "tokens": tokens,
    "tar": tar,
    "mds": mds,
    "lit": lit,
    "lmdb": lmdb,
    "sqlite": sqlite,
    "images": images,
}
"""For each format, writes files and returns the name of its own loader, and both sides."""

if __name__ == "__main__":
    main()
