"""Random access to samples in tar files with WebDataset's layout.

A sample consists of consecutive files in one tar that share their name up to the first dot
(WebDataset's convention). The position of every file is looked up once and cached, so a rank or a
worker reads only its own samples. Like any indexed data set, shards are read in the same order on
any number of ranks, each sample once per epoch, and a run resumes at the exact sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import IO, Any

import numpy as np

from launcher.engine.data.data_files import DataFiles, digest_of, pread
from launcher.engine.data.remote import DEFAULT_CACHE, RemoteCache, Version
from launcher.engine.data.tar_index import Member, TarIndex
from launcher.errors import RecipeError
from launcher.printable import printable_line, shortened, text_of
from launcher.regular_file import open_regular
from launcher.runs.cache import cache_folder

_FORMAT = 2
"""Version of the format of cached indices."""

_KEY = "__key__"
"""Under this name a sample holds what the names of its files have in common."""

_MAX_NAME = 4096
"""Longest name of a file, which is that of Linux; each key takes the memory of the longest."""

_READ_CHUNK_BYTES = 1 << 20
_MAX_PADDING_BYTES = 1 << 20
"""Maximum number of zeros at the end of a tar. GNU tar pads to a multiple of 10 KiB."""

_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError)
"""What tarfile raises for damaged headers."""

_INDEX_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy raises for a damaged file of arrays."""

_Index = dict[str, np.ndarray[Any, Any]]
"""The samples and files of one tar, as arrays.

    keys          the key of each sample
    starts        the index of the first file of each sample, and the number of files
    offsets       the position of each file's content in the tar, in bytes
    sizes         the size of each file, in bytes
    headers       the CRC-32 of each file's header
    extensions    the part of each file's name after the first dot
"""


_KINDS = {
    "keys": "U",
    "starts": "i",
    "offsets": "i",
    "sizes": "i",
    "headers": "i",
    "extensions": "U",
}
"""The kind of the numbers or texts in each array."""


class Shards:
    """A map-style data set of the samples in uncompressed tar files.

    `shards[i]` is a dict from the part of a file name after the first dot, such as `jpg` or `cls`,
    to the content as bytes, with the name before the dot as `__key__`; or the result of `decode`
    for this dict.

    A tar at a URL is downloaded to the cache when it is needed, and once to look up its samples.

    Args:
        files: Paths or URLs of the tar files, in order.
        decode: A function of the dict of bytes; None returns the dict itself.
        cache: The cache of remote files.

    Raises:
        RecipeError: `files` is empty, or a file is missing, damaged, incomplete or compressed.
    """

    def __init__(
        self,
        files: Sequence[Path | str],
        decode: Callable[[dict[str, Any]], Any] | None = None,
        *,
        cache: RemoteCache = DEFAULT_CACHE,
    ) -> None:
        if not files:
            raise RecipeError(
                "Shards got no files. Pass at least one, as in sorted(folder.glob('*.tar'))."
            )
        self._files = DataFiles(files, cache, noun="shard")
        self._decode = decode
        self._indices = self._files.for_each(lambda shard: TarIndex(self._read_index(shard)))
        self.chunks: list[int] = [len(index) for index in self._indices]
        """The number of samples in each tar, in order."""
        self._ends = np.cumsum(self.chunks)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(self._ends.searchsorted(index, side="right"))
        shard_index = self._indices[shard]
        number = index - (int(self._ends[shard - 1]) if shard else 0)
        sample: dict[str, Any] = {_KEY: shard_index.key(number)}
        descriptor, name = self._files.descriptor(shard), self._files.name(shard)
        for member in shard_index.members(number):
            sample[member.extension] = _read_member(descriptor, member, name)
        return sample if self._decode is None else self._decode(sample)

    def fingerprint(self) -> str:
        """Return a text that changes with the names, the sizes or the headers of the files."""
        digest = digest_of(*(index.digest for index in self._indices))
        ends = [self._files.name(shard).rpartition("/")[2] for shard in (0, len(self._indices) - 1)]
        return f"tars: {len(self._indices):,}, {shortened(' to '.join(ends), 100)}, {digest[:16]}"

    def file_of(self, index: int) -> str:
        """Return the path or URL of the tar that has a sample."""
        return self._files.name(int(self._ends.searchsorted(index, side="right")))

    def _read_index(self, shard: int) -> _Index:
        location = self._files.locations[shard]
        if isinstance(location, Path):
            return _read_index(location, f"{location.resolve()}", self._files.version(shard))
        # The cached index serves after the tar has been removed from the cache.
        version = self._files.version(shard)
        cached = _cached_index(_index_path(location, version), version.size)
        while cached is None:
            path = self._files.local_path(shard)
            try:
                return _read_index(path, location, version)
            except RecipeError as error:
                if path.exists():
                    name = self._files.name(shard)
                    raise RecipeError(str(error).replace(str(path), name)) from None
        return cached


def _read_member(descriptor: int, member: Member, name: str) -> bytes:
    """Return the content of a file in a tar, after checking its header against the index.

    Raises:
        RecipeError: The tar has changed since it was indexed.
    """
    offset, size = member.offset, member.size
    # pread, because forked workers share the position of the descriptor.
    data = pread(descriptor, BLOCKSIZE + size, offset - BLOCKSIZE)
    header, content = data[:BLOCKSIZE], data[BLOCKSIZE:]
    if zlib.crc32(header) != member.header or len(content) != size:
        raise RecipeError(
            f"The shard {name} changed during the run: the file at byte {offset - BLOCKSIZE:,} is "
            "not the one that was indexed. Do not modify shards during a run, and start the run "
            "again."
        )
    return content


def _read_index(path: Path, identity: str, version: Version) -> _Index:
    """Return the index of a tar file, from the cache if the file has not changed.

    Args:
        path: The file.
        identity: Its resolved path, or its URL.
        version: Its size and version.

    Raises:
        RecipeError: The file cannot be read, or is not a complete tar file.
    """
    cache_path = _index_path(identity, version)
    cached = _cached_index(cache_path, version.size)
    if cached is not None and _matches(path, cached):
        return cached
    index = _make_index(path)
    _cache_index(cache_path, index)
    return index


def _index_path(identity: str, version: Version) -> Path:
    cache_key = f"{_FORMAT} {identity} {version.size} {version.tag}"
    digest = hashlib.sha256(cache_key.encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_folder("shards") / f"{digest}.npz"


def _cached_index(cache_path: Path, num_bytes: int) -> _Index | None:
    """Return an index from the cache, or None if it is missing or damaged."""
    try:
        with (
            io.BufferedReader(open_regular(cache_path)) as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            index = dict(arrays)
    except _INDEX_ERRORS:
        return None
    return index if _is_index(index, num_bytes) else None


def _is_index(index: _Index, num_bytes: int) -> bool:
    """Return whether arrays are the index of a tar of `num_bytes` bytes."""
    kinds = {name: array.dtype.kind for name, array in index.items() if array.ndim == 1}
    if kinds != _KINDS:
        return False
    starts, offsets, sizes = index["starts"], index["offsets"], index["sizes"]
    counts = {len(index[name]) for name in ("offsets", "sizes", "headers", "extensions")}
    return bool(
        len(starts) == len(index["keys"]) + 1
        and counts == {int(starts[-1])}
        and starts[0] == 0
        and (np.diff(starts) > 0).all()
        and (offsets >= BLOCKSIZE).all()
        and (sizes >= 0).all()
        and (sizes <= num_bytes).all()
        and (offsets <= num_bytes - sizes).all()
    )


def _matches(path: Path, index: _Index) -> bool:
    """Return whether the first and last headers of a tar match its index."""
    members = sorted({0, len(index["offsets"]) - 1})
    try:
        with open_regular(path) as file:
            for member in members if members[-1] >= 0 else ():
                file.seek(int(index["offsets"][member]) - BLOCKSIZE)
                if zlib.crc32(file.read(BLOCKSIZE)) != int(index["headers"][member]):
                    return False
    except OSError:
        return False
    return True


def _make_index(path: Path) -> _Index:
    """Return the index of a tar file, after reading all its headers.

    Raises:
        RecipeError: The file is not a tar, is damaged or incomplete, or contains members without
            content of their own.
    """
    keys: list[str] = []
    starts: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    headers: list[int] = []
    extensions: list[str] = []
    sample_extensions: set[str] = set()
    for member, header in _members(path):
        shown = printable_line(shortened(member.name, 200))
        if len(member.name) > _MAX_NAME:
            problem = f"the name {shown} has {len(member.name):,} characters"
            raise _damage_error(path, member.offset, problem)
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not keys or keys[-1] != key:
            keys.append(key)
            starts.append(len(offsets))
            sample_extensions = set()
        if extension in sample_extensions:
            raise RecipeError(
                f"The shard {path} has {shown} twice in one sample. Write the tar again "
                "with a unique name for each file."
            )
        if extension == _KEY:
            raise RecipeError(
                f"The shard {path} has {shown}, but {_KEY} is the name of the sample's key. Write "
                "the tar again with another name for this file."
            )
        sample_extensions.add(extension)
        offsets.append(member.offset_data)
        sizes.append(member.size)
        headers.append(zlib.crc32(header))
        extensions.append(extension)
    return {
        "keys": np.array(keys, str),
        "starts": np.array([*starts, len(offsets)], np.int64),
        "offsets": np.array(offsets, np.int64),
        "sizes": np.array(sizes, np.int64),
        "headers": np.array(headers, np.int64),
        "extensions": np.array(extensions, str),
    }


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield the regular files of a tar, each with its header block.

    Raises:
        RecipeError: The file is not a complete, uncompressed tar.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(io.BufferedReader(open_regular(path)))
            archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
        except _TAR_ERRORS as error:
            raise RecipeError(
                f"The shard {path} is not an uncompressed tar file: {text_of(error)}. If it is "
                "compressed, decompress it with `gunzip FILE.tar.gz`, because samples in a "
                "compressed tar cannot be read in any order."
            ) from None
        size = path.stat().st_size
        try:
            for member in archive:
                if member.size < 0:
                    raise _damage_error(path, member.offset, "the size of a file is negative")
                if member.offset_data + member.size > size:
                    name = printable_line(shortened(member.name, 200))
                    raise _damage_error(path, member.offset, f"{name} is cut off")
                if not _is_regular_file(path, member):
                    continue
                file.seek(member.offset_data - BLOCKSIZE)
                yield member, file.read(BLOCKSIZE)
        except _TAR_ERRORS as error:
            raise _damage_error(path, archive.offset, text_of(error)) from None
        _check_end(path, file, archive.offset)


def _is_regular_file(path: Path, member: tarfile.TarInfo) -> bool:
    """Return whether a member is a regular file, rather than a directory or a device.

    Raises:
        RecipeError: The member is a link or a sparse file, whose content is not stored with it.
    """
    if member.issym() or member.islnk() or member.issparse():
        name, target = (
            printable_line(shortened(text, 200)) for text in (member.name, member.linkname)
        )
        kind = "sparse file" if member.issparse() else f"link to {target}"
        raise RecipeError(
            f"The shard {path} has {name} as a {kind}, at byte {member.offset:,}, whose "
            "content cannot be read there. Write the tar with `tar --hard-dereference "
            "--dereference` and without --sparse."
        )
    return member.isfile()


def _check_end(path: Path, file: IO[bytes], offset: int) -> None:
    """Check that a tar ends at `offset` with an end-of-archive marker and padding.

    tarfile treats a damaged or truncated header as the end of the archive, without an error.

    Raises:
        RecipeError: The marker is missing, or other data follows it.
    """
    file.seek(offset)
    block = file.read(BLOCKSIZE)
    if not block:
        raise _damage_error(
            path, offset, "the end-of-archive marker is missing, so the tar may lack files"
        )
    if len(block) < BLOCKSIZE:
        raise _damage_error(path, offset, "the file ends in the middle of a header")
    if block.strip(b"\0"):
        raise _damage_error(path, offset, "the header is damaged")
    while piece := file.read(_READ_CHUNK_BYTES):
        if piece.strip(b"\0"):
            position = file.tell() - len(piece.lstrip(b"\0"))
            raise _damage_error(
                path, position, "data follows the end-of-archive marker, as in concatenated tars"
            )
    if file.tell() - offset > _MAX_PADDING_BYTES:
        raise _damage_error(path, offset, "only zeros follow, as in a partially written file")


def _damage_error(path: Path, offset: int, problem: str) -> RecipeError:
    return RecipeError(
        f"The shard {path} is not a complete tar file: at byte {offset:,}, {problem}. Copy the "
        "file again, or remove it from the list of files."
    )


def _cache_index(path: Path, index: _Index) -> None:
    """Write an index to the cache, atomically; ignore errors."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **index)  # type: ignore[arg-type]
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
