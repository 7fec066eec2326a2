"""Blocks or documents of tokens in binary files: nanoGPT's and Megatron-LM's .bin.

A file without a header is a row of token ids. Megatron-LM writes an index next to it, whose name
ends with .idx and which tells how a token is stored and where documents begin.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from launcher.engine.data.data_files import DataFiles, digest_of
from launcher.engine.data.remote import DEFAULT_CACHE, RemoteCache, read_range
from launcher.engine.data.remote import read_version as read_remote_version
from launcher.errors import RecipeError
from launcher.object_stores.locations import is_remote

_MAGIC = b"MMIDIDX\x00\x00"
"""The first bytes of Megatron-LM's index."""

_HEADER_BYTES = 34
"""Size of the part of the index before its arrays."""

_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""How Megatron-LM's index numbers the types of tokens."""

_TOKEN_TYPES = ("uint8", "uint16", "uint32", "int32", "int64")

_NUM_SAMPLED = 16
"""Number of places of each file that are part of the fingerprint."""

_SAMPLED_BYTES = 4096


class _Documents(NamedTuple):
    """What Megatron-LM's index tells of one file."""

    token_type: str
    """How a token is stored."""

    lengths: NDArray[np.int32]
    """The number of tokens of each sequence."""

    starts: NDArray[np.int64]
    """The position of the first token of each sequence, in tokens."""


class TokenFiles:
    """A map-style data set of blocks of tokens, or of documents, in binary files.

    With `block`, `files[i]` is a pair of int64 arrays of this length: tokens, and the tokens that
    follow each of them. Blocks do not overlap and do not span files. Without `block`, `files[i]` is
    the array of the tokens of a document, and `lengths` tells the length of each; this needs
    Megatron-LM's indices.

    Args:
        files: Paths or URLs of .bin files, in order.
        block: Number of tokens of a sample; None gives whole documents.
        token_type: How a token is stored, such as "uint16"; None reads it from Megatron-LM's index.
        vocabulary: Number of different tokens, so that others are refused; None accepts all.
        index: Whether the files have Megatron-LM's indices; None looks for them next to local
            files where `token_type` is None.
        cache: The cache of remote files.

    Raises:
        RecipeError: A file is missing, empty or of another type, or an index does not fit it.
    """

    def __init__(
        self,
        files: Sequence[Path | str] | Path | str,
        *,
        block: int | None = None,
        token_type: str | None = None,
        vocabulary: int | None = None,
        index: bool | None = None,
        cache: RemoteCache = DEFAULT_CACHE,
    ) -> None:
        if token_type is not None and token_type not in _TOKEN_TYPES:
            raise RecipeError(
                f"token_type={token_type!r} is none of {', '.join(_TOKEN_TYPES)}. Set the type "
                "with which the tokens were written."
            )
        if block is not None and block < 1:
            raise RecipeError(f"block={block}: a block has at least one token.")
        self.block, self.vocabulary = block, vocabulary
        self.files = DataFiles([files] if isinstance(files, (str, Path)) else files, cache)
        self._has_index = index if index is not None else token_type is None
        self._documents: list[_Documents] = (
            self.files.for_each(self._read_index) if self._has_index else []
        )
        self._types = [
            np.dtype(
                self._documents[file].token_type if self._has_index else token_type
            ).newbyteorder("<")
            for file in range(len(self.files))
        ]
        self.sizes: list[int] = [self._count(file) for file in range(len(self.files))]
        """Number of tokens in each file."""
        if block is None and not self._has_index:
            raise RecipeError(
                "TokenFiles needs block=, the number of tokens of a sample, for files without "
                "Megatron-LM's index."
            )
        self.chunks: list[int] = [
            len(self._documents[file].lengths) if block is None else max((size - 1) // block, 0)
            for file, size in enumerate(self.sizes)
        ]
        """The number of samples in each file, in order."""
        self._ends = np.array(list(accumulate(self.chunks)), np.int64)
        self._range = range(int(self._ends[-1]))
        for file, size in enumerate(self.sizes):
            if not self.files.is_remote(file):
                self._check(file, self._read(file, 0, min(size, (block or 1024) + 1)))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """The number of tokens of each sample."""
        if self.block is not None:
            return np.full(len(self), self.block, np.int32)
        lengths = np.concatenate([documents.lengths for documents in self._documents])
        return lengths[self._range.start : self._range.stop]

    @property
    def tokens_per_sample(self) -> int | None:
        """The number of tokens of every sample; None where documents differ."""
        return self.block

    def cut(self, start: int, stop: int) -> TokenFiles:
        """Return the samples from `start` up to, but not including, `stop` as a data set."""
        part, kept = TokenFiles.__new__(TokenFiles), self._range[start:stop]
        ends = np.clip(self._ends, kept.start, kept.stop)
        chunks = np.diff(ends, prepend=kept.start).tolist()
        part.__dict__ |= self.__dict__ | {"_range": kept, "chunks": chunks}
        return part

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> Any:
        number = self._range[index]
        file = int(self._ends.searchsorted(number, side="right"))
        place = int(number - (self._ends[file - 1] if file else 0))
        if self.block is None:
            documents = self._documents[file]
            start, length = int(documents.starts[place]), int(documents.lengths[place])
            return self._checked(file, start, length)
        tokens = self._checked(file, place * self.block, self.block + 1)
        return tokens[:-1], tokens[1:]

    def fingerprint(self) -> str:
        """Return a digest of the files' sizes, of their indices, and of parts of local files."""
        parts: list[bytes | str] = [f"{self.block} {self._range}"]
        for file, size in enumerate(self.sizes):
            parts.append(f"{self._types[file]} {size}")
            if self._has_index:
                parts.append(self._documents[file].lengths.tobytes())
            if self.files.is_remote(file):
                parts.append(self.files.version(file).tag)
                continue
            last = max(self.files.size(file) - _SAMPLED_BYTES, 0)
            length = min(_SAMPLED_BYTES, self.files.size(file))
            for place in range(_NUM_SAMPLED):
                offset = last * place // (_NUM_SAMPLED - 1)
                parts.append(self.files.read(file, length, offset))
        return digest_of(*parts)

    def file_of(self, index: int) -> str:
        """Return the path or URL of the file that has a sample."""
        return self.files.name(int(self._ends.searchsorted(self._range[index], side="right")))

    def _checked(self, file: int, start: int, count: int) -> NDArray[np.int64]:
        tokens = self._read(file, start, count).astype(np.int64)
        if self.vocabulary is not None and count and tokens.max() >= self.vocabulary:
            self._check(file, tokens)
        return tokens

    def _read(self, file: int, start: int, count: int) -> NDArray[Any]:
        dtype = self._types[file]
        content = self.files.read(file, count * dtype.itemsize, start * dtype.itemsize)
        return np.frombuffer(content, dtype)

    def _count(self, file: int) -> int:
        """Return the number of tokens in a file.

        Raises:
            RecipeError: The file is empty, has part of a token, or does not fit its index.
        """
        num_bytes, token_bytes = self.files.size(file), self._types[file].itemsize
        name = self.files.name(file)
        if not num_bytes:
            raise RecipeError(f"{name}: the file is empty. Give a file with tokens.")
        if num_bytes % token_bytes:
            raise RecipeError(
                f"{name}: the file has {num_bytes:,} bytes, which is no multiple of the "
                f"{token_bytes} bytes of a token. {self._advice(file)}"
            )
        if self._has_index:
            documents = self._documents[file]
            stops = documents.starts + documents.lengths
            expected = int(stops.max()) if len(stops) else 0
            if expected * token_bytes != num_bytes:
                raise RecipeError(
                    f"{name} has {num_bytes:,} bytes, and its index {_index_of(name)} describes "
                    f"{expected * token_bytes:,}. Copy both files again, from one preprocessing."
                )
        return num_bytes // token_bytes

    def _check(self, file: int, tokens: NDArray[Any]) -> None:
        """Refuse a file whose tokens are outside the vocabulary, or seem to be stored otherwise."""
        name = self.files.name(file)
        if self.vocabulary is not None and (largest := int(tokens.max())) >= self.vocabulary:
            raise RecipeError(
                f"{name}: the file has a token {largest:,}, and the vocabulary has "
                f"{self.vocabulary:,}. {self._advice(file)}"
            )
        is_plain = not self._has_index and self._types[file].itemsize == 2
        if is_plain and tokens[0::2].any() and not tokens[1::2].any():
            raise RecipeError(
                f"{name}: every second token is 0, as where tokens of 32 bits are read as "
                f"{self._types[file].name}. {self._advice(file)}"
            )

    def _advice(self, file: int) -> str:
        if self._has_index:
            return "Its index tells how tokens are stored. Give the file for this vocabulary."
        name = self._types[file].name
        other = "uint32" if name == "uint16" else "uint16"
        return (
            f"The file is read as {name}, without a header. If its tokens are {other}, "
            f"set token_type={other}; otherwise give the file for this vocabulary."
        )

    def _read_index(self, file: int) -> _Documents:
        """Return Megatron-LM's index of a file.

        Raises:
            RecipeError: The index is missing or damaged.
        """
        location = self.files.locations[file]
        index = _index_of(str(location))
        if is_remote(location):
            size = read_remote_version(index, self.files.cache).size
            content = read_range(index, 0, size, self.files.cache)
        else:
            try:
                content = Path(index).read_bytes()
            except OSError as error:
                raise RecipeError(
                    f"{self.files.name(file)} has no index that can be read: {index}: "
                    f"{error.strerror}. Copy Megatron-LM's index next to it, or set token_type= "
                    "for a file without an index."
                ) from None
        try:
            return _parse_index(content)
        except ValueError as error:
            raise RecipeError(
                f"{index} is not a complete index of Megatron-LM: {error}. Copy the file again."
            ) from None


def _index_of(location: str) -> str:
    path, mark, query = location.partition("?") if is_remote(location) else (location, "", "")
    return path.removesuffix(".bin") + ".idx" + mark + query


def _parse_index(content: bytes) -> _Documents:
    """Return the arrays of an index.

    The format is that of `megatron/core/datasets/indexed_dataset.py`: a magic number, the version
    (8 bytes), the type (1 byte), the numbers of sequences and of documents' bounds (8 bytes each),
    the lengths (4 bytes each), the positions in bytes (8 bytes each), and the bounds.

    Raises:
        ValueError: It has another format, or ends early.
    """
    if not content.startswith(_MAGIC):
        raise ValueError(f"it starts with {content[:9]!r} instead of {_MAGIC!r}")
    if len(content) < _HEADER_BYTES:
        raise ValueError(f"it has {len(content)} bytes")
    version, code, num_sequences, num_bounds = struct.unpack_from("<QBQQ", content, len(_MAGIC))
    if version != 1 or code not in _TYPES:
        raise ValueError(f"it has version {version} and type {code} of tokens")
    needed = _HEADER_BYTES + num_sequences * 12 + num_bounds * 8
    if len(content) < needed:
        raise ValueError(f"it has {len(content):,} bytes and needs {needed:,}")
    lengths = np.frombuffer(content, "<i4", num_sequences, _HEADER_BYTES).astype(np.int32)
    starts = np.frombuffer(content, "<i8", num_sequences, _HEADER_BYTES + num_sequences * 4)
    item = np.dtype(_TYPES[code]).itemsize
    if (lengths < 0).any() or (starts < 0).any() or (starts % item).any():
        raise ValueError("a length or position is invalid")
    return _Documents(_TYPES[code], lengths, starts.astype(np.int64) // item)
