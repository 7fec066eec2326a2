"""Rows of an SQLite database, read in any order."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from launcher.engine.data.data_files import DataFiles, digest_of
from launcher.engine.data.remote import DEFAULT_CACHE, RemoteCache
from launcher.engine.data.stores.even_blocks import block_sizes, spaced
from launcher.errors import RecipeError, SampleError
from launcher.printable import error_line, printable_line, shortened

_HEADER_BYTES = 100
"""Size of the header of a database, which holds a counter of its changes."""

_MAGIC = b"SQLite format 3\0"

_NUM_SAMPLED = 64
"""Number of rows, evenly spaced, that are part of the fingerprint."""

_MAX_KEYS = 256
"""Number of rows that one statement reads."""

_Columns = tuple[str, ...]


class SQLiteRows:
    """A map-style data set of the rows of a table, or of a query, in an SQLite database.

    `rows[i]` is a dict from the name of a column to its value, or the result of `decode` for this
    dict. Rows are numbered in the order of `key`, whose values are read once, when the data set is
    made. The database is only read, and must not be written while it is used: a database that has
    changed is refused. Each process opens a connection of its own.

    Args:
        file: Path or URL of the database.
        source: The name of a table or a view, or a SELECT statement.
        key: A column of whole numbers that identifies a row. None is the rowid of a table; views,
            statements and tables without a rowid need a key.
        decode: A function of the dict of a row; None returns the dict itself.
        cache: The cache of remote files.

    Raises:
        RecipeError: The file is missing or is no complete database, the table or the key is
            missing, or the values of the key are not distinct whole numbers.
    """

    def __init__(
        self,
        file: Path | str,
        source: str,
        *,
        key: str | None = None,
        decode: Callable[[dict[str, Any]], Any] | None = None,
        cache: RemoteCache = DEFAULT_CACHE,
    ) -> None:
        self._files, self._decode = DataFiles([file], cache, noun="database"), decode
        self._connections: dict[int, sqlite3.Connection] = {}
        self._header = self._read_header()
        is_query = re.match(r"\s*(select|with)\b", source, re.IGNORECASE) is not None
        if is_query and key is None:
            raise RecipeError(
                f"SQLiteRows needs key= for a statement: {shortened(printable_line(source), 200)}. "
                "Name a column of its result that has a different whole number in each row."
            )
        table = f"({source.strip().rstrip(';')})" if is_query else _quoted(source)
        column = "rowid" if key is None else _quoted(key)
        self._select = f"SELECT {column}, * FROM {table} WHERE {column} IN "  # noqa: S608
        self._source = source
        try:
            self._check_source(table, column, key, is_query=is_query)
            self._keys = self._read_keys(table, column, is_rowid=key is None)
            self._columns = self._read_columns(table)
        except sqlite3.Error as error:
            raise self._unreadable(error) from None

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return several rows, which few statements read."""
        self._check_unchanged()
        count = len(self._keys)
        wanted = []
        for index in indices:
            if not 0 <= index < count:
                raise IndexError(f"row {index} of {count}")
            wanted.append(int(self._keys[index]))
        rows: dict[int, Any] = {}
        for start in range(0, len(wanted), _MAX_KEYS):
            rows |= self._read(indices[start : start + _MAX_KEYS], wanted[start:][:_MAX_KEYS])
        columns, decode, samples = self._columns, self._decode, []
        for index, key in zip(indices, wanted, strict=True):
            if key not in rows:
                raise SampleError(
                    f"Row {index:,} (key {key}) of {self.file_of(index)} is missing. Do not change "
                    "the database during a run, and start it again."
                )
            row = dict(zip(columns, rows[key], strict=True))
            samples.append(row if decode is None else decode(row))
        return samples

    def _read(self, indices: Sequence[int], keys: Sequence[int]) -> dict[int, Any]:
        """Return the values of rows by their keys.

        Raises:
            SampleError: A row cannot be read.
        """
        try:
            cursor = self._connection().execute(
                f"{self._select}({','.join('?' * len(keys))})", tuple(keys)
            )
            return {row[0]: row[1:] for row in cursor}
        except sqlite3.Error as error:
            if len(keys) == 1:
                raise SampleError(
                    f"Row {indices[0]:,} (key {keys[0]}) of {self._files.name(0)} cannot be read: "
                    f"{error_line(error)}. Copy the database again."
                ) from None
        rows: dict[int, Any] = {}
        for index, key in zip(indices, keys, strict=True):  # to find the one that is damaged
            rows |= self._read([index], [key])
        return rows

    @property
    def chunks(self) -> list[int]:
        """The number of rows in each block of 1,024 neighbours, in order."""
        return block_sizes(len(self))

    def fingerprint(self) -> str:
        """Return a digest of the keys, of rows evenly spaced, and of the database's own counter.

        The counter is in the file's header, and grows with each transaction that changes the file.
        """
        keys, chosen = self._keys, spaced(len(self._keys), _NUM_SAMPLED)
        found = self._read(chosen, [int(keys[index]) for index in chosen])
        rows = [repr(found[key]) for key in sorted(found)]
        content = repr(keys) if isinstance(keys, range) else keys.tobytes()
        return digest_of(self._source, repr(self._columns), content, self._header, *rows)

    def file_of(self, index: int) -> str:
        """Return the path or URL of the database, whatever the index."""
        return self._files.name(0)

    def _read_header(self) -> bytes:
        """Return the part of the header that changes with the content.

        Raises:
            RecipeError: The file is no database, or is not complete.
        """
        name, size = self._files.name(0), self._files.size(0)
        header = self._files.read(0, min(_HEADER_BYTES, size), 0)
        if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
            raise RecipeError(
                f"{name} is no SQLite database: it starts with {header[:16]!r}. Give the path of "
                "a database."
            )
        page = int.from_bytes(header[16:18], "big")
        expected = (65536 if page == 1 else page) * int.from_bytes(header[28:32], "big")
        if size < expected:
            raise RecipeError(
                f"{name} is cut off: it has {size:,} bytes, and its header says {expected:,}. Copy "
                "the database again."
            )
        log = Path(f"{self._files.locations[0]}-wal")
        if not self._files.is_remote(0) and log.exists() and log.stat().st_size:
            raise RecipeError(
                f"{name} is open for writing, or was not closed: {printable_line(str(log))} holds "
                "changes that are not in it. Close its writers, or run "
                f"`sqlite3 {name} 'PRAGMA wal_checkpoint(TRUNCATE)'`."
            )
        return header[24:32]  # the counter and the number of pages

    def _check_source(self, table: str, column: str, key: str | None, *, is_query: bool) -> None:
        """Check that the table and the key exist.

        Raises:
            RecipeError: One of them does not.
        """
        execute, name = self._connection().execute, self._files.name(0)
        if not is_query:
            found = "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view')"
            kinds = {each.lower(): kind for each, kind in execute(found)}
            if self._source.lower() not in kinds:
                known = ", ".join(map(repr, sorted(kinds)[:20])) or "no tables"
                raise RecipeError(
                    f"{name} has no table {self._source!r}; it has {known}. Name a table, or give "
                    "a SELECT statement with key=."
                )
        try:
            # SQLite takes a quoted name that is no column for a text, and gives views a rowid NULL.
            is_view = not is_query and kinds[self._source.lower()] == "view"
            has_key = not is_view if key is None else key in self._read_columns(table)
            execute(f"SELECT {column} FROM {table} LIMIT 0")  # noqa: S608
        except sqlite3.OperationalError as error:
            if is_query or "no such column" not in str(error):
                raise
            has_key = False
        if not has_key:
            what = "no rowid" if key is None else f"no column {key!r}"
            raise RecipeError(
                f"{shortened(printable_line(self._source), 200)} in {name} has {what}. Set key= to "
                "a column that has a different whole number in each row."
            )

    def _read_columns(self, table: str) -> _Columns:
        """Return the names of the columns, which SQLite makes different."""
        cursor = self._connection().execute(f"SELECT * FROM {table} LIMIT 0")  # noqa: S608
        return tuple(column[0] for column in cursor.description)

    def _read_keys(self, table: str, column: str, *, is_rowid: bool) -> range | NDArray[np.int64]:
        """Return the values of the key in order.

        Raises:
            RecipeError: One is no whole number, or occurs twice.
        """
        execute = self._connection().execute
        if is_rowid:
            count, first, last = execute(
                f"SELECT count(*), min({column}), max({column}) FROM {table}"  # noqa: S608
            ).fetchone()
            if not count or last - first + 1 == count:  # without gaps: nothing to remember
                return range(first or 0, (first or 0) + count)
        values = (row[0] for row in execute(f"SELECT {column} FROM {table} ORDER BY {column}"))  # noqa: S608
        try:
            keys = np.fromiter(map(_whole, values), np.int64)
        except (TypeError, OverflowError) as error:
            raise RecipeError(
                f"{self._files.name(0)}: a value of the key {column} is {error}, and not a whole "
                "number. Set key= to a column of whole numbers."
            ) from None
        if len(keys) and (same := np.flatnonzero(np.diff(keys) == 0)).size:
            raise RecipeError(
                f"{self._files.name(0)}: the key {column} has the value {keys[same[0]]} twice. Set "
                "key= to a column that has a different whole number in each row."
            )
        return keys

    def _connection(self) -> sqlite3.Connection:
        """Return the connection of this process, because none may be used after a fork."""
        process = os.getpid()
        if process not in self._connections:
            # The parent's connections stay in the dict: SQLite must not close them in a child.
            self._connections[process] = self._connect()
        return self._connections[process]

    def _connect(self) -> sqlite3.Connection:
        for _ in range(3):
            path = self._files.local_path(0)
            # Immutable: without locks, which network file systems may lack, and without files
            # beside the database.
            location = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
            try:
                return sqlite3.connect(location, uri=True, check_same_thread=False)
            except sqlite3.OperationalError as error:
                if path.exists():
                    raise self._unreadable(error) from None
                # Another process made room in the cache.
        raise SampleError(f"{self._files.name(0)} was removed from the cache again and again.")

    def _check_unchanged(self) -> None:
        location, version = self._files.locations[0], self._files.version(0)
        if not isinstance(location, Path):
            return  # the cache keeps one version
        try:
            status = location.stat()
        except OSError as error:
            raise RecipeError(
                f"Cannot read the database {self._files.name(0)}: {error.strerror}."
            ) from None
        if (status.st_size, str(status.st_mtime_ns)) != (version.size, version.tag):
            raise RecipeError(
                f"The database {self._files.name(0)} changed during the run. Do not write to it "
                "during a run, and start the run again."
            )

    def _unreadable(self, error: sqlite3.Error) -> RecipeError:
        return RecipeError(
            f"{self._files.name(0)} cannot be read: {shortened(error_line(error), 300)}. Check the "
            "statement, or copy the database again."
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connections": {}}

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def _quoted(name: str) -> str:
    text = name.replace('"', '""')
    return f'"{text}"'


def _whole(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(repr(value)[:100])
    return value
