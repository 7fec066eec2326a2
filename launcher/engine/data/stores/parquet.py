"""Rows of Parquet and Arrow files, read in any order.

A Parquet file is read in row groups. Each process decodes a row group once and keeps it while there
is memory for it, so a recipe whose data is larger than that memory sets `shuffle="window"`, which
finishes a row group before it goes on to others.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from launcher.engine.data.data_files import DataFiles, digest_of
from launcher.engine.data.extras import import_extra
from launcher.engine.data.remote import DEFAULT_CACHE, RemoteCache
from launcher.engine.data.stores.columns import Getter, getter
from launcher.errors import RecipeError, SampleError
from launcher.printable import error_line, shortened

if TYPE_CHECKING:
    import pyarrow as pa

_PARQUET, _ENCRYPTED, _ARROW = b"PAR1", b"PARE", b"ARROW1"

_TAIL_BYTES = 64 << 10
"""Number of bytes at the end of a Parquet file that are read first; they mostly hold the footer."""

_MAX_OPEN = 32
"""Largest number of Parquet files that a process keeps open."""

_Source = Callable[[int], Any]
"""Reads a row group or a batch of an open file, by its number in the file."""

_STREAM = b"\xff\xff\xff\xff"
"""The first bytes of an Arrow stream."""


class _Index(NamedTuple):
    """What the footer of a file tells."""

    counts: list[int]
    """The number of rows of each row group, or of each record batch."""

    names: list[str]
    """The names of the columns."""

    digest: str
    """A digest of the footer."""


class _Group(NamedTuple):
    """A row group in memory."""

    getters: dict[str, Getter]
    """A function for each column, from the number of a row to its value."""

    num_bytes: int
    """The memory that it takes."""


class ParquetRows:
    """A map-style data set of the rows of Parquet or Arrow files.

    `rows[i]` is a dict from the name of a column to its value, or the result of `decode` for this
    dict. Numbers are numpy scalars, lists of numbers are numpy arrays, text is str and binary data
    is bytes; None stands for a null. Arrow files, such as those that Hugging Face writes, are
    mapped into memory.

    Args:
        files: Paths or URLs of the files, in order.
        columns: The names of the columns to read; None reads all.
        decode: A function of the dict of a row; None returns the dict itself.
        memory_bytes: Memory for decoded row groups in each process; a larger group is kept alone.
        cache: The cache of remote files.

    Raises:
        RecipeError: A file is missing or damaged, lacks a column, or pyarrow is not installed.
    """

    def __init__(
        self,
        files: Sequence[Path | str] | Path | str,
        *,
        columns: Sequence[str] | None = None,
        decode: Callable[[dict[str, Any]], Any] | None = None,
        memory_bytes: int = 1 << 30,
        cache: RemoteCache = DEFAULT_CACHE,
    ) -> None:
        import_extra("pyarrow", "parquet", "Parquet and Arrow files")
        self._files = DataFiles([files] if isinstance(files, (str, Path)) else files, cache)
        self._decode, self._memory_bytes = decode, memory_bytes
        self._columns = None if columns is None else list(columns)
        indices = self._files.for_each(self._read_index)
        self._check_columns(indices)
        self.chunks: list[int] = [count for index in indices for count in index.counts]
        """The number of rows of each row group, in order."""
        self._places = [
            (file, group) for file, index in enumerate(indices) for group in range(len(index[0]))
        ]
        self._ends = np.array(list(accumulate(self.chunks)), np.int64)
        self._digest = digest_of(*(index.digest for index in indices), repr(self._columns))
        self._groups: OrderedDict[int, _Group] = OrderedDict()
        self._sources: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Any:
        return self._row(*self._place(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return several rows, each row group of which is read once."""
        places = [self._place(index) for index in indices]
        rows: list[Any] = [None] * len(places)
        for position in sorted(range(len(places)), key=lambda position: places[position][0]):
            rows[position] = self._row(*places[position])
        return rows

    def fingerprint(self) -> str:
        """Return a digest of the files' footers and the columns."""
        return self._digest

    def file_of(self, index: int) -> str:
        """Return the path or URL of the file that has a row."""
        return self._files.name(self._places[self._place(index)[0]][0])

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of a row's group, and its place in the group."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = int(self._ends.searchsorted(index, side="right"))
        return group, int(index - self._ends[group] + self.chunks[group])

    def _row(self, group: int, row: int) -> Any:
        getters = self._group(group).getters
        try:
            values = {name: get(row) for name, get in getters.items()}
        except (ValueError, IndexError) as error:  # such as text that is not UTF-8
            raise SampleError(
                f"Row {row} of {self._title(group)} is damaged: {error_line(error)}."
            ) from None
        return values if self._decode is None else self._decode(values)

    def _group(self, number: int) -> _Group:
        group = self._groups.get(number)
        if group is not None:
            self._groups.move_to_end(number)
            return group
        group = self._read_group(number)
        self._groups[number] = group
        total = sum(each.num_bytes for each in self._groups.values())
        while total > self._memory_bytes and len(self._groups) > 1:
            total -= self._groups.popitem(last=False)[1].num_bytes
        return group

    def _read_group(self, number: int) -> _Group:
        import pyarrow as pa

        file, group = self._places[number]
        source = self._source(file)
        try:
            allocated = pa.total_allocated_bytes()
            table = source(group)
            names = table.schema.names
            arrays = dict(zip(names, map(_joined, table.columns), strict=True))
            # What is mapped into memory takes none, unless it had to be decompressed.
            num_bytes = max(pa.total_allocated_bytes() - allocated, 0)
            if table.num_rows != self.chunks[number]:
                raise pa.ArrowInvalid(f"{table.num_rows} rows instead of {self.chunks[number]}")
            order = self._columns or list(arrays)
            return _Group({name: getter(arrays[name]) for name in order}, num_bytes)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise SampleError(
                f"{self._title(number)} cannot be read: {shortened(error_line(error), 500)}. Copy "
                "the file again, or remove it from the list of files."
            ) from None

    def _source(self, file: int) -> _Source:
        """Return a function that reads a row group of a file, or a batch of an Arrow file."""
        import pyarrow as pa

        if file in self._sources:
            self._sources.move_to_end(file)
            return self._sources[file]
        try:
            # Mapped through the descriptor, so that the file stays the same if its name goes away.
            mapped = pa.memory_map(f"/dev/fd/{self._files.descriptor(file)}")
            source = self._open(file, mapped)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self._files.name(file), error) from None
        while len(self._sources) >= _MAX_OPEN:
            self._sources.popitem(last=False)
        self._sources[file] = source
        return source

    def _open(self, file: int, mapped: Any) -> _Source:
        import pyarrow.parquet as pq

        columns = self._columns
        start = self._files.read(file, min(8, self._files.size(file)), 0)
        if start.startswith(_PARQUET):
            parquet = pq.ParquetFile(mapped)
            return lambda group: parquet.read_row_group(group, columns=columns, use_threads=False)
        get = _batches(mapped, is_stream=not start.startswith(_ARROW))[1]
        return get if columns is None else lambda batch: get(batch).select(columns)

    def _read_index(self, file: int) -> _Index:
        """Return the index of a file.

        Raises:
            RecipeError: The file is neither Parquet nor Arrow, or is damaged.
        """
        import pyarrow as pa

        name = self._files.name(file)
        try:
            tail = self._files.read_end(file, _TAIL_BYTES)
            if tail.endswith(_PARQUET):
                return self._read_footer(file, tail)
            if tail.endswith(_ENCRYPTED):
                raise RecipeError(f"{name} is encrypted. Write it again without encryption.")
            start = self._files.read(file, min(8, self._files.size(file)), 0)
            if start.startswith((_ARROW, _STREAM)):
                mapped = pa.memory_map(f"/dev/fd/{self._files.descriptor(file)}")
                schema, get, num = _batches(mapped, is_stream=start.startswith(_STREAM))
                counts = [get(number).num_rows for number in range(num)]
                digest = digest_of(repr(counts), str(schema), str(self._files.size(file)), tail)
                return _Index(counts, schema.names, digest)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged(name, error) from None
        what = (
            "has no footer, as in a partially written file"
            if start[:4] == _PARQUET
            else ("is neither a Parquet nor an Arrow file")
        )
        raise RecipeError(
            f"{name} {what}: it ends with {tail[-4:]!r}, and a Parquet file ends with "
            f"{_PARQUET!r}. Copy the file again, or remove it from the list of files."
        )

    def _read_footer(self, file: int, tail: bytes) -> _Index:
        import pyarrow as pa
        import pyarrow.parquet as pq

        length = struct.unpack("<I", tail[-8:-4])[0] + 8
        if length > self._files.size(file) - 4:
            raise pa.ArrowInvalid(f"a footer of {length:,} bytes is larger than the file")
        footer = tail[-length:] if length <= len(tail) else self._files.read_end(file, length)
        metadata = pq.read_metadata(pa.BufferReader(_PARQUET + footer))
        groups = range(metadata.num_row_groups)
        counts = [metadata.row_group(group).num_rows for group in groups]
        names = metadata.schema.to_arrow_schema().names
        return _Index(counts, names, digest_of(footer))

    def _check_columns(self, indices: list[_Index]) -> None:
        """Check that all files have the columns to read.

        Raises:
            RecipeError: A file lacks one.
        """
        for file, index in enumerate(indices):
            wanted = self._columns if self._columns is not None else indices[0].names
            missing = [name for name in wanted if name not in index.names]
            if missing and index.counts:
                raise RecipeError(
                    f"{self._files.name(file)} has no column {missing[0]!r}; it has "
                    f"{', '.join(map(repr, index.names[:20]))}. Set columns=[...] to columns that "
                    "all files have."
                )

    def _title(self, group: int) -> str:
        file, number = self._places[group]
        return f"Row group {number} of {self._files.name(file)}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_groups": OrderedDict(), "_sources": OrderedDict()}

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def _batches(mapped: Any, *, is_stream: bool) -> tuple[pa.Schema, _Source, int]:
    """Return the schema of an Arrow file, a function that reads a batch, and their number."""
    import pyarrow as pa

    if is_stream:
        stream = pa.ipc.open_stream(mapped)
        batches = list(stream)
        return stream.schema, batches.__getitem__, len(batches)
    reader = pa.ipc.open_file(mapped)
    return reader.schema, reader.get_batch, reader.num_record_batches


def _joined(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    import pyarrow as pa

    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    joined = column.combine_chunks()
    return joined if isinstance(joined, pa.Array) else pa.concat_arrays(joined.chunks)


def _damaged(name: str, error: BaseException) -> RecipeError:
    return RecipeError(
        f"{name} cannot be read: {shortened(error_line(error), 500)}. Copy the file again, or "
        "remove it from the list of files."
    )
