"""The recipe `images` reads the same samples from each format."""

from __future__ import annotations

import io
import json
import re
import sqlite3
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten, treespec_dumps

from launcher import RecipeError
from launcher.engine.data.order import OrderRequest
from launcher.recipes.images import (
    build_data,
    count_folders,
    files_at,
    find_format,
    find_parts,
    images,
    open_images,
    to_tensor,
)

IMAGES = [(index // 4, f"{index:02}") for index in range(8)]
"""The class and the name of each image; four in each of two classes."""


def encoded(index: int) -> bytes:
    """Return a PNG whose pixels depend on its number."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(index).integers(0, 255, (5, 4, 3), np.uint8)
    image.fromarray(pixels).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def write_folder(folder: Path) -> Path:
    """Write a folder for each class."""
    for index, (label, name) in enumerate(IMAGES):
        path = folder / str(label) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(index))
    return folder


def write_tars(folder: Path) -> Path:
    """Write two tars as WebDataset does."""
    folder.mkdir()
    for index, (label, name) in enumerate(IMAGES):
        with tarfile.open(folder / f"{index // 5}.tar", "a") as archive:
            for ending, content in (("png", encoded(index)), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder


def write_parquet(folder: Path, *, nested: bool) -> Path:
    """Write a Parquet file, in which images are bytes, or nested as on the Hugging Face Hub."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    contents = [encoded(index) for index in range(len(IMAGES))]
    column = [{"bytes": each, "path": "x"} for each in contents] if nested else contents
    table = pa.table({"image": column, "label": [label for label, _ in IMAGES]})
    parquet.write_table(table, folder / "a.parquet")
    return folder


def write_indexed(path: Path, sizes: str, samples: list[tuple[bytes, bytes]]) -> int:
    """Write samples of two values in a file with an index; return its size."""
    rows = [struct.pack(sizes, *map(len, values)) + b"".join(values) for values in samples]
    ends = 4 + 4 * (len(rows) + 1) + np.cumsum([0, *map(len, rows)])
    path.write_bytes(struct.pack("<I", len(rows)) + ends.astype("<u4").tobytes() + b"".join(rows))
    return path.stat().st_size


def write_mds(folder: Path) -> Path:
    """Write a file as MosaicML Streaming does."""
    folder.mkdir()
    rows = [(encoded(index), struct.pack("<q", label)) for index, (label, _) in enumerate(IMAGES)]
    # The sizes of columns whose size is not fixed come first: here that of the image.
    samples = [struct.pack("<I", len(image)) + image + label for image, label in rows]
    ends = 4 + 4 * (len(samples) + 1) + np.cumsum([0, *map(len, samples)])
    path = folder / "shard.00000.mds"
    path.write_bytes(
        struct.pack("<I", len(samples)) + ends.astype("<u4").tobytes() + b"".join(samples)
    )
    shard = {
        "column_names": ["image", "label"],
        "column_encodings": ["png", "int"],
        "column_sizes": [None, 8],
        "compression": None,
        "format": "mds",
        "raw_data": {"basename": path.name, "bytes": path.stat().st_size},
        "samples": len(rows),
        "version": 2,
    }
    (folder / "index.json").write_text(json.dumps({"shards": [shard], "version": 2}))
    return folder


def write_lit(folder: Path) -> Path:
    """Write a file as LitData does."""
    folder.mkdir()
    rows = [(encoded(index), struct.pack("<q", label)) for index, (label, _) in enumerate(IMAGES)]
    size = write_indexed(folder / "chunk-0-0.bin", "<II", rows)
    chunk = {"chunk_bytes": size, "chunk_size": len(rows), "filename": "chunk-0-0.bin"}
    spec = treespec_dumps(tree_flatten({"image": b"", "label": 0})[1])
    config = {"data_format": ["bytes", "int"], "data_spec": spec}
    (folder / "index.json").write_text(json.dumps({"chunks": [chunk], "config": config}))
    return folder


def write_lmdb(folder: Path) -> Path:
    """Write an LMDB environment."""
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(folder), map_size=1 << 24) as opened, opened.begin(write=True) as change:
        for index, (label, name) in enumerate(IMAGES):
            change.put(f"{label}/{name}".encode(), encoded(index))
    return folder


def write_sqlite(path: Path) -> Path:
    """Write a database with a table of images."""
    rows = [(encoded(index), label) for index, (label, _) in enumerate(IMAGES)]
    with sqlite3.connect(file := path.with_suffix(".db")) as database:
        database.execute("CREATE TABLE images (image BLOB, label INTEGER)")
        database.executemany("INSERT INTO images VALUES (?, ?)", rows)
    database.close()
    return file


WRITERS: dict[str, Callable[[Path], Path]] = {
    "folder": write_folder,
    "tar": write_tars,
    "parquet": lambda folder: write_parquet(folder, nested=False),
    "hub": lambda folder: write_parquet(folder, nested=True),
    "mds": write_mds,
    "lit": write_lit,
    "lmdb": write_lmdb,
    "sqlite": write_sqlite,
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_format_gives_the_same_samples(tmp_path: Path, name: str) -> None:
    """The images and classes of each format are those that were written, in the same order."""
    location = str(WRITERS[name](tmp_path / "data"))
    found = open_images(location, to_tensor)
    assert len(found) == len(IMAGES)
    assert find_format(location) == ("parquet" if name == "hub" else name)
    image = pytest.importorskip("PIL.Image")
    for index, (label, _) in enumerate(IMAGES):
        pixels, found_label = found[index]
        assert found_label == label
        assert torch.equal(pixels, to_tensor(image.open(io.BytesIO(encoded(index)))))


def test_the_parts_of_a_folder_are_found(tmp_path: Path) -> None:
    """A folder with train and val is both parts, and its classes are counted."""
    write_folder(tmp_path / "train")
    assert find_parts(str(tmp_path), "") == (str(tmp_path / "train"), "")
    write_tars(tmp_path / "val")
    parts = find_parts(str(tmp_path), "")
    assert parts == (str(tmp_path / "train"), str(tmp_path / "val"))
    assert count_folders(parts[0]) == 2
    data = build_data(*parts, 4)
    assert (len(data.train), len(data.evaluation)) == (8, 8)
    assert data.train[0][0].shape == (3, 4, 4)


def test_classes_are_balanced(tmp_path: Path) -> None:
    """With balanced=true a class with fewer images is seen as often as the others."""
    folder = write_folder(tmp_path / "train")
    for path in sorted((folder / "1").iterdir())[1:]:
        path.unlink()
    train = build_data(str(folder), "", 4, balanced=True).train
    request = OrderRequest(seed=0, window=8, batch_size=2, total_positions=len(train))
    order = train.make_order(request).elements_at(0, np.arange(len(train)))
    labels = [train[int(index)][1] for index in order]
    assert abs(labels.count(0) - labels.count(1)) <= 1


def test_what_cannot_be_known_is_asked_for(tmp_path: Path) -> None:
    """Classes that cannot be counted or balanced, and unknown columns, are refused."""
    tars = str(write_tars(tmp_path / "tars"))
    with pytest.raises(RecipeError, match=r"elsewhere.*data=FOLDER"):
        build_data(str(tmp_path / "elsewhere"), "", 4)
    with pytest.raises(RecipeError, match="classes=N"):
        images(data=tars).model()
    with pytest.raises(RecipeError, match="balanced=true"):
        build_data(tars, "", 4, balanced=True)
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("CREATE TABLE images (picture BLOB, label INTEGER)")
        database.execute("INSERT INTO images VALUES (x'00', 1)")
    database.close()
    with pytest.raises(RecipeError, match="picture"):
        open_images(str(tmp_path / "a.db"), to_tensor)[0]


def test_a_range_of_tars_is_listed() -> None:
    """A range in braces gives one name for each number, with its zeros."""
    names = files_at("s3://bucket/train-{008..011}.tar", "*.tar")
    assert names == [f"s3://bucket/train-0{number:02}.tar" for number in (8, 9, 10, 11)]


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    """An index.json that is no JSON is refused by the path of its folder."""
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(RecipeError, match=re.escape(str(tmp_path))):
        open_images(str(tmp_path), to_tensor)
