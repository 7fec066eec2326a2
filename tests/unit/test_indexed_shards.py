"""Tests of MosaicML's and LitData's formats, on files written here and by the libraries."""

from __future__ import annotations

import bz2
import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from range_server import serve
from torch.utils._pytree import tree_flatten, treespec_dumps

from launcher import LitShards, MosaicShards, RecipeError, RemoteCache, SampleError

NUM_SAMPLES = 25


def write_shard(path: Path, samples: list[bytes]) -> int:
    """Write a file with a table of offsets, and return its size."""
    start = 4 + 4 * (len(samples) + 1)
    offsets = np.cumsum([start, *map(len, samples)]).astype("<u4")
    content = struct.pack("<I", len(samples)) + offsets.tobytes() + b"".join(samples)
    path.write_bytes(content)
    return len(content)


def mosaic_sample(index: int) -> dict[str, Any]:
    """Return a sample of values of several types."""
    return {
        "n": index,
        "a": np.arange(index % 3 + 1, dtype="<u2"),
        "s": f"é{index}",
        "k": index * 10**20,
        "x": np.full(2, index, "<f4"),
    }


def write_mosaic(folder: Path, **changes: Any) -> Path:
    """Write samples as MDSWriter does, in files of 10."""
    folder.mkdir()
    shards = []
    for number, start in enumerate(range(0, NUM_SAMPLES, 10)):
        samples = []
        for index in range(start, min(start + 10, NUM_SAMPLES)):
            sample = mosaic_sample(index)
            array = sample["a"]
            values = [
                bytes([16, 1 << 2, len(array)]) + array.tobytes(),  # uint16, one axis, its size
                sample["s"].encode(),
                str(sample["k"]).encode(),
            ]
            samples.append(
                struct.pack("<3I", *map(len, values))
                + struct.pack("<q", index)
                + b"".join(values)
                + sample["x"].tobytes()
            )
        name = f"shard.{number:05}.mds"
        num_bytes = write_shard(folder / name, samples)
        shards.append(
            {
                "column_names": ["n", "a", "s", "k", "x"],
                "column_encodings": ["int", "ndarray", "str", "str_int", "ndarray:float32:2"],
                "column_sizes": [8, None, None, None, 8],
                "compression": None,
                "format": "mds",
                "hashes": [],
                "raw_data": {"basename": name, "bytes": num_bytes, "hashes": {}},
                "samples": len(samples),
                "size_limit": 1 << 26,
                "version": 2,
                "zip_data": None,
            }
            | changes
        )
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))
    return folder


def lit_sample(index: int) -> dict[str, Any]:
    """Return a sample of nested values."""
    return {
        "n": index,
        "x": torch.full((2, 3), float(index)),
        "v": torch.arange(index),
        "more": (f"é{index}", [index % 2 == 0, index / 2]),
        "a": np.full((1, 2), index, np.int16),
    }


def write_lit(folder: Path, **changes: Any) -> Path:
    """Write samples as LitData's BinaryWriter does, in files of 10."""
    folder.mkdir()
    chunks = []
    for number, start in enumerate(range(0, NUM_SAMPLES, 10)):
        samples = []
        for index in range(start, min(start + 10, NUM_SAMPLES)):
            sample = lit_sample(index)
            values = [
                struct.pack("<q", index),
                struct.pack(">IIII", 1, 2, 2, 3) + sample["x"].numpy().tobytes(),
                sample["v"].numpy().tobytes(),
                sample["more"][0].encode(),
                bytes([sample["more"][1][0]]),
                struct.pack("<d", index / 2),
                struct.pack("<IIII", 1, 2, 1, 2) + sample["a"].tobytes(),
            ]
            samples.append(struct.pack("<7I", *map(len, values)) + b"".join(values))
        name = f"chunk-0-{number}.bin"
        num_bytes = write_shard(folder / name, samples)
        chunks.append(
            {"chunk_bytes": num_bytes, "chunk_size": len(samples), "dim": None, "filename": name}
        )
    config = {
        "chunk_bytes": 1 << 26,
        "chunk_size": None,
        "compression": None,
        "data_format": ["int", "tensor", "no_header_tensor:18", "str", "bool", "float", "numpy"],
        "data_spec": treespec_dumps(tree_flatten(lit_sample(0))[1]),
        "encryption": None,
        "item_loader": "PyTreeLoader",
    } | changes
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))
    return folder


def same(one: Any, other: Any) -> bool:
    """Return whether two samples have the same types and values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (np.ndarray, torch.Tensor)):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    return bool(one == other)


FORMATS = [(MosaicShards, write_mosaic, mosaic_sample), (LitShards, write_lit, lit_sample)]
formats = pytest.mark.parametrize(("store", "write", "sample"), FORMATS, ids=["mosaic", "lit"])


@formats
def test_samples_are_read_in_any_order(tmp_path: Path, store: Any, write: Any, sample: Any) -> None:
    """Samples of local and remote folders have the values, types and structure that were given."""
    shards = store(write(tmp_path / "data"))
    assert (len(shards), shards.chunks) == (25, [10, 10, 5])
    order = np.random.default_rng(0).permutation(25).tolist()
    for each in (shards, store(tmp_path / "data", decode=dict)):
        for index in order:
            assert same(each[index], sample(index))
    with serve(tmp_path) as server:
        cache = RemoteCache(folder=tmp_path / "cache")
        remote = store(f"{server.url}/data", cache=cache)
        assert same(remote[24], sample(24))
        assert len(list((tmp_path / "cache").glob("*.data"))) == 1
        assert remote.fingerprint() == shards.fingerprint()
    with pytest.raises(IndexError):
        shards[25]


@pytest.mark.parametrize(("store", "write"), [pair[:2] for pair in FORMATS], ids=["mosaic", "lit"])
def test_damaged_folders_are_refused(tmp_path: Path, store: Any, write: Any) -> None:
    """A missing index, a cut-off file and a damaged table of offsets are named."""
    folder = write(tmp_path / "data")
    path = min(folder.glob("*.*s" if store is MosaicShards else "*.bin"))
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\xff" * 4 + content[12:])
    with pytest.raises(SampleError, match=f"Sample 1 of {path}"):
        store(folder)[1]
    path.write_bytes(content[:60] + b"\xff" * 40 + content[100:])
    with pytest.raises(SampleError, match=f"Sample 0 of {path} cannot be decoded"):
        store(folder)[0]
    path.write_bytes(content[:-1])
    with pytest.raises(RecipeError, match=f"{path} has {len(content) - 1:,} bytes"):
        store(folder)
    (folder / "index.json").write_text("{}")
    with pytest.raises(RecipeError, match="KeyError"):
        store(folder)
    (folder / "index.json").unlink()
    with pytest.raises(RecipeError, match=r"index\.json: No such file"):
        store(folder)


@pytest.mark.parametrize(
    ("store", "write", "changes", "message"),
    [
        (
            MosaicShards,
            write_mosaic,
            {"compression": "br", "raw_data": {"basename": "a", "bytes": 1, "hashes": {}}},
            "compressed with br",
        ),
        (MosaicShards, write_mosaic, {"format": "json"}, "expected 'mds'"),
        (MosaicShards, write_mosaic, {"column_encodings": ["pkl"]}, "allow_pickle"),
        (MosaicShards, write_mosaic, {"column_encodings": ["new"]}, "'new'"),
        (
            MosaicShards,
            write_mosaic,
            {"raw_data": {"basename": "../a", "bytes": 1}},
            "outside the folder",
        ),
        (LitShards, write_lit, {"compression": "zstd"}, "compression='zstd'"),
        (LitShards, write_lit, {"item_loader": "TokensLoader"}, "TokenFiles"),
        (LitShards, write_lit, {"data_format": ["pickle"]}, "allow_pickle"),
        (LitShards, write_lit, {"data_format": ["video"]}, "'video'"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, store: Any, write: Any, changes: dict[str, Any], message: str
) -> None:
    """Compressed files, pickles that were not allowed, and unknown formats are refused."""
    with pytest.raises(RecipeError, match=message):
        store(write(tmp_path / "data", **changes))


@pytest.mark.parametrize("algorithm", ["zstd", "gz", "bz2"])
def test_compressed_mosaic_shards_are_read_from_the_cache(tmp_path: Path, algorithm: str) -> None:
    """Compressed files, local or remote, are decompressed once, and damaged ones are named."""
    folder = write_mosaic(tmp_path / "data")
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        path = folder / shard["raw_data"]["basename"]
        content = compress(algorithm, path.read_bytes())
        packed = path.with_name(f"{path.name}.{algorithm}")
        packed.write_bytes(content)
        path.unlink()
        shard["compression"] = f"{algorithm}:3"
        shard["zip_data"] = {"basename": packed.name, "bytes": len(content), "hashes": {}}
    (folder / "index.json").write_text(json.dumps(index))
    cache = RemoteCache(folder=tmp_path / "cache")
    for _ in range(2):
        shards = MosaicShards(folder, cache=cache)
        assert all(same(shards[number], mosaic_sample(number)) for number in (0, 24, 11, 9))
        assert len(list(cache.path.glob("*.data"))) == 3
    with serve(tmp_path) as server:
        remote = MosaicShards(f"{server.url}/data", cache=cache)
        assert same(remote[24], mosaic_sample(24))
        assert len(list(cache.path.glob("*.data"))) == 5  # as it is stored, and its content
        assert server.requests[f"data/{packed.name}"] == 1
    packed.write_bytes(content[:20] + bytes(len(content) - 20))
    with pytest.raises(SampleError, match=rf"{packed} cannot be decompressed"):
        MosaicShards(folder, cache=cache)[24]


def compress(algorithm: str, content: bytes) -> bytes:
    """Return content as MDSWriter compresses it."""
    if algorithm == "zstd":
        compressed: bytes = pytest.importorskip("zstandard").compress(content)
        return compressed
    return gzip.compress(content) if algorithm == "gz" else bz2.compress(content)


def test_lit_shards_are_those_of_the_library(tmp_path: Path) -> None:
    """Files that LitData itself writes are read as they were given."""
    writer = pytest.importorskip("litdata.streaming.writer").BinaryWriter(
        str(tmp_path / "data"), chunk_size=10
    )
    for index in range(NUM_SAMPLES):
        writer[index] = lit_sample(index)
    writer.done()
    writer.merge()
    shards = LitShards(tmp_path / "data")
    assert shards.chunks == [10, 10, 5]
    assert all(same(shards[index], lit_sample(index)) for index in range(NUM_SAMPLES))


def test_mosaic_shards_are_those_of_the_library(tmp_path: Path) -> None:
    """Files that MosaicML Streaming itself writes are read as they were given."""
    streaming = pytest.importorskip("streaming", exc_type=ImportError)
    columns = {"n": "int", "a": "ndarray", "s": "str", "k": "str_int", "x": "ndarray:float32:2"}
    with streaming.MDSWriter(out=str(tmp_path / "data"), columns=columns, size_limit=400) as writer:
        for index in range(NUM_SAMPLES):
            writer.write(mosaic_sample(index))
    shards = MosaicShards(tmp_path / "data")
    assert len(shards.chunks) > 1
    for index in range(NUM_SAMPLES):
        read, given = shards[index], mosaic_sample(index)
        assert read.keys() == given.keys()
        assert all(same(read[name], given[name]) for name in given)
