"""Predictions in a file: ranks write parts, which are merged in the order of the samples.

JSON lines hold an object for each sample, whose keys are the columns; NaN and infinity are null.
Parquet files, which need pyarrow, hold the same columns; a row of a tensor is a list. Each rank
writes the micro-batches that it computes to a part, and which samples these are to an index.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from launcher.errors import RecipeError, UsageError
from launcher.json_file import Count, read_json
from launcher.printable import printable_line
from launcher.runs.files import write_json

Format = Literal["jsonl", "parquet"]

_FORMATS: Mapping[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""The format of a file by its suffix."""

_ROWS_PER_GROUP = 1 << 16
"""Rows of a row group of Parquet. A file does not depend on which rank computed what."""

_MAX_INDEX_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the ranks predict, and where they write it."""

    input: str
    """The file to read, or the name of a data set."""

    is_file: bool
    """Whether `input` is a file, which the recipe's `predict_data` reads."""

    parts: Path
    """The folder of the parts."""

    format: Format
    """The format of the merged file."""


@dataclass(frozen=True)
class _Span:
    """The predictions of consecutive samples in a part."""

    start: Count
    """Index of the first sample."""

    count: Count
    """Number of samples."""

    num_bytes: Count
    """Number of their bytes, which follow those of the span before."""


@dataclass(frozen=True)
class _Index:
    """What a rank has written to its part."""

    columns: tuple[str, ...]
    spans: tuple[_Span, ...]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A file of predictions."""

    num_samples: int
    """Number of samples."""

    columns: tuple[str, ...]
    """Names of the columns."""


def format_of(path: Path) -> Format:
    """Return the format of a file by its suffix.

    Raises:
        UsageError: The suffix is unknown, or pyarrow is missing.
    """
    shown = printable_line(str(path))
    found = _FORMATS.get(path.suffix.lower())
    if found is None:
        raise UsageError(
            f"--out {shown}: the end of the name chooses the format. Expected one of "
            f"{', '.join(_FORMATS)}, found {printable_line(path.suffix) or 'none'}."
        )
    if found == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UsageError(
            f"--out {shown}: Parquet needs the package pyarrow. Install it with `pip install "
            "'gpu-launcher[parquet]'`, or write JSON lines (.jsonl)."
        )
    return found


class PredictionPart:
    """The part of a rank, which is complete when it is closed.

    Args:
        prediction: What is predicted.
        rank: The rank.
    """

    def __init__(self, prediction: Prediction, rank: int) -> None:
        self._folder, self._rank = prediction.parts, rank
        self._file = _part(self._folder, rank).open("xb")
        self._columns: tuple[str, ...] | None = None
        self._spans: list[_Span] = []
        self._arrow = _Arrow() if prediction.format == "parquet" else None

    def add(self, start: int, count: int, columns: Mapping[str, Any]) -> None:
        """Write the columns of `count` samples, the first of which has the index `start`.

        Args:
            start: The index, larger than those before.
            count: The number of samples.
            columns: Lists and NumPy arrays, with one value for each sample.

        Raises:
            RecipeError: A column has values that the format cannot hold, or there were other
                columns before.
        """
        if self._columns is None:
            self._columns = tuple(columns)
        if self._columns != tuple(columns):
            raise _other_columns(self._columns, tuple(columns))
        content = _json_lines(columns) if self._arrow is None else self._arrow.encode(columns)
        self._file.write(content)
        self._spans.append(_Span(start, count, len(content)))

    def close(self) -> None:
        """Write the index of the part."""
        self._file.close()
        if self._arrow is not None and self._spans:
            self._arrow.write_schema(_schema(self._folder, self._rank))
        index = _Index(self._columns or (), tuple(self._spans))
        write_json(_index(self._folder, self._rank), asdict(index))


def _json_lines(columns: Mapping[str, Any]) -> bytes:
    lists = [_as_list(column) for column in columns.values()]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]
    try:
        return msgspec.json.Encoder().encode_lines(rows)
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise _unfit(error, "JSON lines") from None


def _as_list(column: Any) -> list[Any]:
    return list(column.tolist() if hasattr(column, "tolist") else column)


class _Arrow:
    """Encodes columns as streams of Arrow, and remembers a schema that fits all of them."""

    def __init__(self) -> None:
        self._schema: Any = None

    def encode(self, columns: Mapping[str, Any]) -> Any:
        import pyarrow as pa

        try:
            batch = pa.RecordBatch.from_pydict(
                {name: _arrow_array(column) for name, column in columns.items()}
            )
            self._schema = _unified([*filter(None, [self._schema]), batch.schema])
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise _unfit(error, "Parquet") from None
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue()

    def write_schema(self, path: Path) -> None:
        path.write_bytes(self._schema.serialize())


def _arrow_array(column: Any) -> Any:
    """Return a column as an array of Arrow: numbers, text, or nested lists of these."""
    import pyarrow as pa

    shape = getattr(column, "shape", ())
    if len(shape) < 2:
        return pa.array(column)
    if 0 in shape:
        return pa.array(column.tolist())
    values = pa.array(column.reshape(-1))
    for size in reversed(shape[1:]):
        offsets = pa.array(range(0, len(values) + 1, size), type=pa.int64())
        values = pa.LargeListArray.from_arrays(offsets, values)
    return values


def _unified(schemas: Sequence[Any]) -> Any:
    import pyarrow as pa

    return pa.unify_schemas(schemas, promote_options="permissive")


def merge(prediction: Prediction, ranks: int, target: Path) -> Merged:
    """Merge the parts of all ranks into a file that does not exist.

    Raises:
        RecipeError: The ranks have other columns, or a column has values of several types.
        OSError: The file cannot be written.
    """
    folder = prediction.parts
    indices = [
        (rank, read_json(_index(folder, rank), _Index, max_bytes=_MAX_INDEX_BYTES))
        for rank in range(ranks)
        if _index(folder, rank).exists()
    ]
    written = [(rank, index) for rank, index in indices if index.spans]
    columns = written[0][1].columns
    for _, index in written:
        if index.columns != columns:
            raise _other_columns(columns, index.columns)
    spans = sorted((span.start, span, rank) for rank, index in written for span in index.spans)
    with ExitStack() as stack:
        files = {rank: stack.enter_context(_part(folder, rank).open("rb")) for rank, _ in written}
        contents = ((span, files[rank]) for _, span, rank in spans)
        if prediction.format == "jsonl":
            with target.open("xb") as file:
                for span, part in contents:
                    file.write(part.read(span.num_bytes))
        else:
            schemas = [_schema(folder, rank).read_bytes() for rank, _ in written]
            _write_parquet(target, schemas, (part.read(span.num_bytes) for span, part in contents))
    return Merged(num_samples=sum(span.count for _, span, _ in spans), columns=columns)


def _write_parquet(target: Path, schemas: Sequence[bytes], streams: Iterator[bytes]) -> None:
    """Write tables to a Parquet file, in row groups of equal size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = _unified([pa.ipc.read_schema(pa.py_buffer(each)) for each in schemas])
        with pq.ParquetWriter(target, schema) as writer:
            waiting = schema.empty_table()
            for stream in streams:
                table = pa.ipc.open_stream(stream).read_all().cast(schema)
                waiting = pa.concat_tables([waiting, table])
                while len(waiting) >= _ROWS_PER_GROUP:
                    writer.write_table(waiting.slice(0, _ROWS_PER_GROUP).combine_chunks())
                    waiting = waiting.slice(_ROWS_PER_GROUP)
            if len(waiting):
                writer.write_table(waiting.combine_chunks())
    except pa.ArrowException as error:
        raise _unfit(error, "Parquet") from None


def _unfit(error: Exception, kind: str) -> RecipeError:
    return RecipeError(
        f"The predictions cannot be written as {kind}: {printable_line(str(error))}. A column is a "
        "tensor, an array, or a list of numbers, text or lists of these, and has values of one "
        "type."
    )


def _other_columns(first: Sequence[str], other: Sequence[str]) -> RecipeError:
    return RecipeError(
        f"The predictions of some batches have the columns {', '.join(map(repr, first))}, and "
        f"those of another {', '.join(map(repr, other))}. Return the same columns, in the same "
        "order, for every batch."
    )


def _part(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}"


def _index(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


def _schema(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.schema"
