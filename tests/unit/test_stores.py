"""Tests of the data sets that read stored formats sample by sample, on real files."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from range_server import serve
from torch.utils.data import default_collate

from launcher import ParquetRows, RecipeError, RemoteCache, SampleError, TokenFiles

pa = pytest.importorskip("pyarrow")


def table(start: int, stop: int) -> Any:
    """Return rows of many types, with nulls."""
    numbers = range(start, stop)
    return pa.table(
        {
            "number": pa.array(numbers, pa.int32()),
            "flag": pa.array([number % 3 == 0 if number % 4 else None for number in numbers]),
            "text": [f"row {number} ä" for number in numbers],
            "raw": pa.array([bytes([number]) * number for number in numbers], pa.large_binary()),
            "some": pa.array([None if number % 2 else number / 2 for number in numbers]),
            "list": pa.array([list(range(number % 5)) for number in numbers], pa.list_(pa.int64())),
            "fixed": pa.array([[number, -number] for number in numbers], pa.list_(pa.float32(), 2)),
            "word": pa.array([f"w{number % 2}" for number in numbers]).dictionary_encode(),
            "nested": [{"a": number, "b": [str(number)]} for number in numbers],
        }
    )


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with lists in place of arrays and Python's numbers in place of numpy's."""
    return {
        name: value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        for name, value in row.items()
    }


@pytest.fixture
def parquet(tmp_path: Path) -> list[Path]:
    """Return two Parquet files of 25 and 10 rows in groups of 10."""
    import pyarrow.parquet as pq

    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(table(0, 25), paths[0], row_group_size=10)
    pq.write_table(table(25, 35), paths[1], row_group_size=10)
    return paths


def test_rows_are_those_of_arrow(parquet: list[Path], tmp_path: Path) -> None:
    """Rows of Parquet, Arrow and stream files are Arrow's own rows, in any order and type."""
    expected = table(0, 35).to_pylist()
    rows = ParquetRows(parquet)
    assert rows.chunks == [10, 10, 5, 10]
    assert [plain(rows[index]) for index in range(35)] == expected
    order = np.random.default_rng(0).permutation(35).tolist()
    assert [plain(row) for row in rows.__getitems__(order)] == [expected[index] for index in order]
    for name, new in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        path = tmp_path / f"{name}.arrow"
        with new(path, table(0, 35).schema) as writer:
            writer.write_table(table(0, 35), max_chunksize=20)
        rows = pickle.loads(pickle.dumps(ParquetRows(path)))
        assert rows.chunks == [20, 15]
        assert [plain(row) for row in rows.__getitems__(order)] == [
            expected[index] for index in order
        ]
    with pytest.raises(IndexError):
        rows[35]


def test_columns_and_decode_choose_what_a_row_is(parquet: list[Path]) -> None:
    """Only the given columns are read, in their order, and `decode` makes the sample of a row."""
    rows = ParquetRows(parquet, columns=["text", "number"], decode=lambda row: list(row.values()))
    assert rows[30] == ["row 30 ä", 30]
    assert rows[30][1].dtype == np.int32
    assert rows.fingerprint() != ParquetRows(parquet, columns=["number"]).fingerprint()
    with pytest.raises(RecipeError, match=r"a\.parquet has no column 'label'"):
        ParquetRows(parquet, columns=["number", "label"])


def test_a_row_group_is_decoded_once(parquet: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group is read once while memory lasts, and once per visit where it holds one group."""
    read: list[int] = []
    original = ParquetRows._read_group

    def note(rows: ParquetRows, number: int) -> Any:
        read.append(number)
        return original(rows, number)

    monkeypatch.setattr(ParquetRows, "_read_group", note)
    order = np.random.default_rng(0).permutation(35).tolist()
    for memory_bytes, batch, reads in ((1 << 30, 1, 4), (1, 35, 4), (1, 1, 30)):
        read.clear()
        rows = ParquetRows(parquet, columns=["number"], memory_bytes=memory_bytes)
        for start in range(0, 35, batch):
            indices = order[start : start + batch]
            assert [row["number"] for row in rows.__getitems__(indices)] == indices
        assert len(read) == reads


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut off", "no footer"),
        ("footer", "cannot be read"),
        ("length", "larger than the file"),
        ("other", "neither a Parquet nor an Arrow file"),
        ("empty", "neither"),
    ],
)
def test_a_damaged_parquet_file_is_refused(parquet: list[Path], damage: str, message: str) -> None:
    """A file with a broken footer is refused by its name, before training."""
    content = parquet[1].read_bytes()
    parquet[1].write_bytes(
        {
            "cut off": content[:-100],
            "footer": content[:-800] + bytes(400) + content[-400:],
            "length": content[:-8] + struct.pack("<I", 1 << 30) + b"PAR1",
            "other": b"something else",
            "empty": b"",
        }[damage]
    )
    with pytest.raises(RecipeError, match=message) as caught:
        ParquetRows(parquet)
    assert str(parquet[1]) in str(caught.value)


def test_a_damaged_row_group_is_named(parquet: list[Path]) -> None:
    """Damage inside a row group raises a SampleError with the file and the group."""
    content = bytearray(parquet[0].read_bytes())
    content[4:400] = bytes(396)
    parquet[0].write_bytes(content)
    rows = ParquetRows(parquet)
    with pytest.raises(SampleError, match=r"Row group 0 of .*a\.parquet"):
        rows[3]
    assert rows[30]["number"] == 30


def test_a_changed_parquet_file_has_another_fingerprint(parquet: list[Path]) -> None:
    """The fingerprint follows the content, and not the place or the time of the files."""
    import pyarrow.parquet as pq

    before = ParquetRows(parquet).fingerprint()
    moved = [path.rename(path.with_name(f"x-{path.name}")) for path in parquet]
    os.utime(moved[0], (1, 1))
    assert ParquetRows(moved).fingerprint() == before
    pq.write_table(table(1, 11), moved[1], row_group_size=10)
    assert ParquetRows(moved).fingerprint() != before


def test_rows_are_read_in_forked_processes(parquet: list[Path]) -> None:
    """A forked process reads on from the files and groups of its parent."""
    rows = ParquetRows(parquet, memory_bytes=1)
    assert rows[0]["number"] == 0
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()

    def read() -> None:
        sender.send([int(row["number"]) for row in rows.__getitems__([34, 0, 12])])

    child = context.Process(target=read)
    child.start()
    child.join(timeout=30)
    assert child.exitcode == 0
    assert receiver.recv() == [34, 0, 12]
    assert rows[20]["number"] == 20


def test_remote_parquet_files_are_downloaded_when_a_row_is_read(
    parquet: list[Path], tmp_path: Path
) -> None:
    """The footers of files at URLs are read in ranges, and only files that are needed arrive."""
    with serve(tmp_path) as server:
        urls = [f"{server.url}/{path.name}" for path in parquet]
        rows = ParquetRows(urls, cache=RemoteCache(folder=tmp_path / "cache"))
        assert len(rows) == 35
        assert list((tmp_path / "cache").glob("*")) == []
        assert plain(rows[30]) == table(30, 31).to_pylist()[0]
        assert len(list((tmp_path / "cache").glob("*.data"))) == 1
        assert rows.fingerprint() == ParquetRows(parquet).fingerprint()


def write_megatron(path: Path, documents: list[list[int]], dtype: str) -> None:
    """Write documents as Megatron-LM does."""
    code = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}[dtype]
    item = np.dtype(dtype).itemsize
    lengths = np.array([len(document) for document in documents], "<i4")
    starts = (np.cumsum(lengths) - lengths).astype("<i8") * item
    path.write_bytes(b"".join(np.array(each, f"<{dtype[0]}{item}").tobytes() for each in documents))
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
        + lengths.tobytes()
        + starts.tobytes()
        + np.arange(len(documents) + 1, dtype="<i8").tobytes()
    )


DOCUMENTS = [[1, 2, 3], [40_000], [], [5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_megatron_files_are_read_as_documents_or_blocks(tmp_path: Path, dtype: str) -> None:
    """The index gives the type and the documents; blocks run on across documents."""
    paths = [tmp_path / "a_text_document.bin", tmp_path / "b.bin"]
    write_megatron(paths[0], DOCUMENTS, dtype)
    write_megatron(paths[1], [[12, 13]], "uint8")
    files = TokenFiles(paths)
    assert [files[index].tolist() for index in range(len(files))] == [*DOCUMENTS, [12, 13]]
    assert files.lengths.tolist() == [3, 1, 0, 7, 2]
    assert files.chunks == [4, 1]
    blocks = TokenFiles(paths, block=3)
    assert [[part.tolist() for part in blocks[index]] for index in range(len(blocks))] == [
        [[1, 2, 3], [2, 3, 40_000]],
        [[40_000, 5, 6], [5, 6, 7]],
        [[7, 8, 9], [8, 9, 10]],
    ]
    assert blocks.chunks == [3, 0]
    cut = files.cut(3, 5)
    assert (len(cut), cut.chunks, cut.lengths.tolist()) == (2, [1, 1], [7, 2])
    assert cut[1].tolist() == [12, 13]
    with serve(tmp_path) as server:
        urls = [f"{server.url}/{path.name}" for path in paths]
        remote = TokenFiles(urls, cache=RemoteCache(folder=tmp_path / "cache"))
        assert [remote[index].tolist() for index in range(5)] == [*DOCUMENTS, [12, 13]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "No such file"),
        ("magic", "starts with"),
        ("cut off", "needs"),
        ("type", "type 99"),
        ("bin", "describes 22"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, damage: str, message: str) -> None:
    """An index that is missing, damaged or of another file is refused by its name."""
    path = tmp_path / "a.bin"
    write_megatron(path, DOCUMENTS, "uint16")
    index = path.with_suffix(".idx")
    content = index.read_bytes()
    if damage == "bin":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "missing":
        index.unlink()
    else:
        index.write_bytes(
            {
                "magic": b"x" + content,
                "cut off": content[:-9],
                "type": content[:17] + b"\x63" + content[18:],
            }[damage]
        )
    with pytest.raises(RecipeError, match=message) as caught:
        TokenFiles(path)
    assert str(index) in str(caught.value)


def test_changed_tokens_have_another_fingerprint(tmp_path: Path) -> None:
    """A file of the same size with other tokens has another fingerprint, and a copy the same."""
    path, copy = tmp_path / "a.bin", tmp_path / "copy.bin"
    tokens = np.arange(20_000, dtype="<u2")
    path.write_bytes(tokens.tobytes())
    copy.write_bytes(tokens.tobytes())
    prints = [TokenFiles(each, block=8, token_type="uint16").fingerprint() for each in (path, copy)]
    assert prints[0] == prints[1]
    path.write_bytes(tokens[::-1].tobytes())
    assert TokenFiles(path, block=8, token_type="uint16").fingerprint() != prints[0]
    with pytest.raises(RecipeError, match="token_type='float32'"):
        TokenFiles(path, block=8, token_type="float32")
    with pytest.raises(RecipeError, match="needs block="):
        TokenFiles(path, token_type="uint16")


def test_a_file_that_changes_its_size_is_refused(tmp_path: Path) -> None:
    """A file that is cut off after the start of a run raises an error with its name."""
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(200)) * 2)
    files = TokenFiles(path, block=9, token_type="uint8")
    assert files[39 // 9][0].tolist() == list(range(36, 45))
    path.write_bytes(bytes(100))
    with pytest.raises(SampleError, match=r"a\.bin .* gave 0"):
        files[30]
    with pytest.raises(RecipeError, match=r"a\.bin has 100 bytes, and had 400"):
        pickle.loads(pickle.dumps(files))[0]


def test_a_hugging_face_data_set_is_read_as_it_is(tmp_path: Path) -> None:
    """A folder of save_to_disk gives batches, and its Arrow files are rows of ParquetRows."""
    datasets = pytest.importorskip("datasets")
    columns = {"x": [[float(index)] * 4 for index in range(20)], "y": list(range(20))}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "data", num_shards=2)
    rows = datasets.load_from_disk(str(tmp_path / "data")).with_format("torch")
    batch = default_collate(rows.__getitems__([7, 3]))
    assert batch["x"].tolist() == [[7.0] * 4, [3.0] * 4]
    files = sorted((tmp_path / "data").glob("*.arrow"))
    arrow = ParquetRows(files)
    assert [int(row["y"]) for row in arrow] == list(range(20))
    assert arrow[7]["x"].tolist() == [7.0] * 4
