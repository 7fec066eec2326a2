"""Tests of the data sets that read databases and folders of images, on real files."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from range_server import serve
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from launcher import (
    ImageFolder,
    LMDBSamples,
    Mixture,
    RecipeError,
    RemoteCache,
    SampleError,
    Source,
    SQLiteRows,
    weighted,
)
from launcher.engine.data.order import chunks_of
from launcher.engine.data.sample_files import file_of

NUM_SAMPLES = 40


def write_sqlite(path: Path, *, offset: int = 0) -> Path:
    """Write a table whose rowids have gaps, a view of it, and a table without a rowid."""
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE samples (number INTEGER, raw BLOB, text TEXT, some REAL)")
        database.executemany(
            "INSERT INTO samples (rowid, number, raw, text, some) VALUES (?, ?, ?, ?, ?)",
            [
                (3 * index + 1, index + offset, bytes([index]) * 9000, f"é{index}", index / 2)
                for index in range(NUM_SAMPLES)
            ],
        )
        database.execute("CREATE VIEW even AS SELECT * FROM samples WHERE number % 2 = 0")
        database.execute("CREATE TABLE keyed (name TEXT PRIMARY KEY, place INT) WITHOUT ROWID")
        database.execute("INSERT INTO keyed VALUES ('a', 5), ('b', 3)")
    database.close()
    return path


def write_lmdb(path: Path, *, offset: int = 0) -> Path:
    """Write keys of several lengths, and one that is no sample."""
    lmdb = pytest.importorskip("lmdb")
    environment = lmdb.open(str(path), map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for index in range(NUM_SAMPLES):
            transaction.put(b"k" * (index % 3) + b"%04d" % index, str(index + offset).encode())
        transaction.put(b"__len__", b"40")
    environment.close()
    return path


def write_images(folder: Path, *, offset: int = 0) -> Path:
    """Write images of one colour for each class, whose value is their number."""
    from PIL import Image

    for index in range(NUM_SAMPLES):
        path = folder / ("cat", "ant/deep", "ant")[index % 3] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2), (index + offset, 0, 255)).save(path)
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    return folder


def read_sqlite(path: Path | str, **options: Any) -> SQLiteRows:
    """Return the numbers of the table."""
    return SQLiteRows(path, "samples", decode=lambda row: row["number"], **options)


def read_lmdb(path: Path | str, **options: Any) -> LMDBSamples:
    """Return the values as numbers."""
    return LMDBSamples(path, decode=lambda _, value: int(value), **options)


def read_images(path: Path) -> ImageFolder:
    """Return the number in the first pixel of each image with its class."""
    return ImageFolder(path, transform=lambda image: image.getpixel((0, 0))[0])


STORES = {
    "sqlite": (write_sqlite, read_sqlite),
    "lmdb": (write_lmdb, read_lmdb),
    "images": (write_images, read_images),
}
stores = pytest.mark.parametrize(("write", "read"), STORES.values(), ids=STORES)


def numbers(dataset: Any, indices: list[int]) -> list[int]:
    """Return the numbers of samples, in one read where the data set can do that."""
    get = getattr(dataset, "__getitems__", None)
    samples = [dataset[index] for index in indices] if get is None else get(indices)
    return [sample[0] if isinstance(sample, tuple) else sample for sample in samples]


@stores
def test_samples_are_read_in_any_order_and_process(
    tmp_path: Path, write: Callable[..., Path], read: Callable[..., Any]
) -> None:
    """Each sample is read once under its index, also in a forked process and after pickling."""
    dataset = read(write(tmp_path / "data"))
    assert len(dataset) == NUM_SAMPLES
    in_order = numbers(dataset, list(range(NUM_SAMPLES)))
    assert sorted(in_order) == list(range(NUM_SAMPLES))
    order = np.random.default_rng(0).permutation(NUM_SAMPLES).tolist()
    expected = [in_order[index] for index in order]
    assert numbers(dataset, order) == [numbers(dataset, [index])[0] for index in order] == expected
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    child = context.Process(target=lambda: sender.send(numbers(dataset, order)))
    child.start()
    child.join(timeout=30)
    assert child.exitcode == 0
    assert receiver.recv() == expected
    assert numbers(dataset, order[:3]) == expected[:3]
    assert sum(chunks_of(dataset, len(dataset))) == NUM_SAMPLES
    assert Path(dataset.file_of(7)).is_file()
    with pytest.raises(IndexError):
        dataset[NUM_SAMPLES]


@stores
def test_a_changed_store_has_another_fingerprint(
    tmp_path: Path, write: Callable[..., Path], read: Callable[..., Any]
) -> None:
    """The fingerprint follows the content, and not the place or the time of the files."""
    path = write(tmp_path / "data")
    before = read(path).fingerprint()
    moved = path.rename(tmp_path / "moved")
    os.utime(moved, (1, 1))
    again = read(moved)
    assert again.fingerprint() == before
    assert read(write(tmp_path / "other", offset=1)).fingerprint() != before


def test_a_store_that_is_written_during_a_run_is_refused(tmp_path: Path) -> None:
    """Rows and values that were committed, removed files and a file cut off are named."""
    database, environment = write_sqlite(tmp_path / "a.db"), write_lmdb(tmp_path / "lmdb")
    rows, values = read_sqlite(database), read_lmdb(environment)
    assert (rows[3], values[0]) == (3, 0)
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE samples SET number = 7")
    connection.close()
    with pytest.raises(RecipeError, match=r"a\.db changed during the run"):
        rows[3]

    writer = (
        "import lmdb, sys\n"
        "with lmdb.open(sys.argv[1]) as environment, environment.begin(write=True) as change:\n"
        "    change.put(b'new', b'1')\n"
    )
    subprocess.run([sys.executable, "-c", writer, environment], check=True)
    with pytest.raises(RecipeError, match=r"data\.mdb changed during the run"):
        values[3]
    os.truncate(environment / "data.mdb", 8192)
    with pytest.raises(RecipeError, match=r"data\.mdb changed during the run"):
        values[3]
    images = read_images(write_images(tmp_path / "images"))
    Path(images.file_of(3)).write_bytes(b"\x89PNG broken")
    with pytest.raises(SampleError, match=r"Image 3, .*ant/11\.png, cannot be read"):
        images[3]
    Path(images.file_of(3)).unlink()
    with pytest.raises(SampleError, match=r"ant/11\.png, was removed"):
        images[3]


@pytest.mark.parametrize(
    ("source", "key", "message"),
    [
        ("missing", None, "has no table 'missing'; it has 'even', 'keyed', 'samples'"),
        ("even", None, "has no rowid"),
        ("keyed", None, "has no rowid"),
        ("keyed", "name", "the key \"name\" is 'a', and not a whole number"),
        ("samples", "label", "has no column 'label'"),
        ("SELECT * FROM samples", None, "needs key="),
        ("SELECT * FROM nowhere", "number", "no such table: nowhere"),
        ("SELECT number / 2 AS half FROM samples", "half", "has the value 0 twice"),
    ],
)
def test_a_source_that_cannot_be_addressed_is_refused(
    tmp_path: Path, source: str, key: str | None, message: str
) -> None:
    """Missing tables and keys, and keys that do not identify a row, are named."""
    with pytest.raises(RecipeError, match=message):
        SQLiteRows(write_sqlite(tmp_path / "a.db"), source, key=key)


def test_rows_of_views_and_statements_have_a_key(tmp_path: Path) -> None:
    """The rows of a view or a statement come in the order of the key, as plain values."""
    path = write_sqlite(tmp_path / "a.db")
    assert len(SQLiteRows(path, "even", key="number")) == 20
    rows = SQLiteRows(path, "select text, -number as n, raw, some from samples;", key="n")
    assert rows[1] == {"text": "é38", "n": -38, "raw": bytes([38]) * 9000, "some": 19.0}
    assert default_collate(rows.__getitems__([4, 0]))["n"].tolist() == [-35, -39]
    again = pickle.loads(pickle.dumps(SQLiteRows(path, "keyed", key="place")))
    assert again.__getitems__([1, 0]) == [{"name": "a", "place": 5}, {"name": "b", "place": 3}]


def test_broken_databases_are_refused(tmp_path: Path) -> None:
    """A file that is none, is cut off, is still being written or has damaged pages is named."""
    path = write_sqlite(tmp_path / "a.db")
    content = path.read_bytes()
    damaged = tmp_path / "damaged.db"
    for changed, message in (
        (b"something else", "is no SQLite database"),
        (content[:-4096], "is cut off"),
        (content[:100] + b"\xff" * 3996 + content[4096:], "cannot be read"),
    ):
        damaged.write_bytes(changed)
        with pytest.raises(RecipeError, match=f"{damaged} {message}"):
            read_sqlite(damaged)
    rows = read_sqlite(path)
    page = content.index(bytes([20]) * 4092) // 4096
    path.write_bytes(content[: page * 4096] + b"\xff" * 4096 + content[(page + 1) * 4096 :])
    os.utime(path, ns=(0, int(rows._files.version(0).tag)))
    with pytest.raises(SampleError, match=r"Row \d+ \(key \d+\) of .*a\.db cannot be read"):
        rows.__getitems__([0, 20, 39])
    Path(f"{damaged}-wal").write_bytes(b"changes")
    damaged.write_bytes(content)
    with pytest.raises(RecipeError, match="wal_checkpoint"):
        read_sqlite(damaged)


def test_broken_environments_and_folders_are_refused(tmp_path: Path) -> None:
    """What is no LMDB environment, and folders without classes or images, are named."""
    pytest.importorskip("lmdb")
    (tmp_path / "empty" / "ant").mkdir(parents=True)
    (tmp_path / "data.mdb").write_bytes(bytes(10_000))
    for path in (tmp_path, tmp_path / "data.mdb", tmp_path / "missing"):
        with pytest.raises(RecipeError, match="LMDB environment"):
            LMDBSamples(path)
    with pytest.raises(RecipeError, match=r"empty/ant has no images"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(RecipeError, match="has no folders"):
        ImageFolder(tmp_path / "empty" / "ant")
    with pytest.raises(RecipeError, match="Cannot read the folder of images"):
        ImageFolder(tmp_path / "missing")


def test_images_come_in_the_order_of_torchvision(tmp_path: Path) -> None:
    """Classes are sorted by name, and files by folder and name; nested folders belong to them."""
    images = ImageFolder(write_images(tmp_path / "data"))
    assert images.classes == ["ant", "cat"]
    assert images.class_to_idx == {"ant": 0, "cat": 1}
    names = [images.file_of(index).partition("data/")[2] for index in (0, 13, 26, 39)]
    assert names == ["ant/02.png", "ant/deep/01.png", "cat/00.png", "cat/39.png"]
    image, target = images[39]
    assert (image.mode, image.size, image.getpixel((0, 0)), target) == (
        "RGB",
        (3, 2),
        (39, 0, 255),
        1,
    )
    assert np.bincount(images.targets).tolist() == [26, 14]


def test_databases_at_urls_are_downloaded(tmp_path: Path) -> None:
    """A database or an environment at a URL is read from the cache."""
    write_sqlite(tmp_path / "a.db")
    write_lmdb(tmp_path / "lmdb")
    with serve(tmp_path) as server:
        cache = RemoteCache(folder=tmp_path / "cache")
        rows = read_sqlite(f"{server.url}/a.db", cache=cache)
        values = read_lmdb(f"{server.url}/lmdb/data.mdb", cache=cache)
        assert (rows[39], sorted(values)) == (39, list(range(NUM_SAMPLES)))
        assert rows.fingerprint() == read_sqlite(tmp_path / "a.db").fingerprint()


def test_the_file_of_a_sample_is_found_inside_what_wraps_a_store(tmp_path: Path) -> None:
    """Subsets, concatenations, mixtures and weighted data name the file of their store."""
    images = read_images(write_images(tmp_path / "images"))
    rows = read_sqlite(write_sqlite(tmp_path / "a.db"))
    part: Any = Subset(cast("Dataset[Any]", images), [5, 6])
    both: Any = ConcatDataset([cast("Dataset[Any]", rows), part])
    assert [file_of(both, index) for index in (0, 41)] == [
        str(tmp_path / "a.db"),
        images.file_of(6),
    ]
    assert Mixture({"one": Source(rows), "two": Source(images)}).file_of(41) == images.file_of(1)
    assert weighted(images, np.ones(NUM_SAMPLES)).file_of(3) == images.file_of(3)
    assert file_of(range(3), 0) is None
