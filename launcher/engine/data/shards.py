"""Samples in tar files, read in any order: what WebDataset streams, with a number for each sample.

A sample is the files of one tar that follow each other and share their name up to the first dot
(WebDataset's convention). Where each of them lies is looked up once and kept, so that a rank or a
worker reads just what it takes: each sample once, in the same order in any world, and a run goes on
to the sample, as with any data set that can be indexed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import IO, Any

import numpy as np

from launcher.errors import RecipeError
from launcher.runs.cache import cache_folder

_FORMAT = 2
"""Of the indices that are kept."""

_READ_AT_ONCE = 1 << 20
_MOST_PADDING = 1 << 20
"""Zeros with which a tar may end; GNU tar fills up to 10 KiB."""

_Index = dict[str, np.ndarray[Any, Any]]


class Shards:
    """Samples of uncompressed tar files, as a data set with a length.

    `shards[i]` is a dict of the sample's files, by what stands behind the first dot of their names,
    such as `jpg` and `cls`, and its `__key__`; or what `decode` makes of that.

    Args:
        files: The tar files, in their order.
        decode: Called with the dict of bytes; None leaves it.

    Raises:
        RecipeError: There are none, or one is no whole tar file, or compressed.
    """

    def __init__(
        self, files: Sequence[Path | str], decode: Callable[[dict[str, Any]], Any] | None = None
    ) -> None:
        if not files:
            raise RecipeError("Shards of no files: give some, as in sorted(folder.glob('*.tar')).")
        self._paths = [Path(file) for file in files]
        self._decode = decode
        self._shards = [_read_index(path) for path in self._paths]
        self._ends = np.cumsum([len(shard["starts"]) - 1 for shard in self._shards])
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(self._ends.searchsorted(index, side="right"))
        shard = self._shards[number]
        within = index - (int(self._ends[number - 1]) if number else 0)
        members = range(int(shard["starts"][within]), int(shard["starts"][within + 1]))
        sample: dict[str, Any] = {"__key__": str(shard["keys"][within])}
        for member in members:
            content = _read_member(self._open(number), shard, member, self._paths[number])
            sample[str(shard["extensions"][member])] = content
        return sample if self._decode is None else self._decode(sample)

    def _open(self, number: int) -> int:
        if number not in self._files:
            self._files[number] = os.open(self._paths[number], os.O_RDONLY)
        return self._files[number]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def _read_member(descriptor: int, shard: _Index, member: int, path: Path) -> bytes:
    """Return the content of a member, which still stands where the index has it.

    Raises:
        RecipeError: The file is another than the one that was looked through.
    """
    offset, size = int(shard["offsets"][member]), int(shard["sizes"][member])
    # pread: workers that are forked share the file and have no place in it of their own.
    found = _pread(descriptor, BLOCKSIZE + size, offset - BLOCKSIZE)
    header, content = found[:BLOCKSIZE], found[BLOCKSIZE:]
    if zlib.crc32(header) != int(shard["headers"][member]) or len(content) != size:
        raise RecipeError(
            f"The shard {path} has changed while it is read: at byte {offset - BLOCKSIZE:,} is not "
            "the file that was there. Leave shards as they are during a run, and start it again."
        )
    return content


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    """Return `length` bytes at `offset`, or fewer at the end of the file.

    One call may return fewer than are there: Linux gives 2 GiB at most.
    """
    pieces = []
    while length > 0 and (piece := os.pread(descriptor, length, offset)):
        pieces.append(piece)
        length, offset = length - len(piece), offset + len(piece)
    return b"".join(pieces)


def _read_index(path: Path) -> _Index:
    """Return where the files of a tar lie, from what was kept if it is still of this file.

    Raises:
        RecipeError: It cannot be read, or is not a whole tar file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise RecipeError(f"Cannot read the shard {path}: {error.strerror}.") from None
    known = f"{_FORMAT} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    kept = cache_folder("shards") / f"{hashlib.sha256(known.encode()).hexdigest()[:32]}.npz"
    try:
        with kept.open("rb") as file, np.load(file, allow_pickle=False) as found:
            index = dict(found)
        if _is_of(path, index):
            return index
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # none, or a damaged one
        pass
    index = _make_index(path)
    _keep_index(kept, index)
    return index


def _is_of(path: Path, index: _Index) -> bool:
    """Return whether the first and the last headers of a file are those in its index."""
    some = sorted({0, len(index["offsets"]) - 1})
    with path.open("rb", buffering=0) as file:
        for member in some if some[-1] >= 0 else ():
            file.seek(int(index["offsets"][member]) - BLOCKSIZE)
            if zlib.crc32(file.read(BLOCKSIZE)) != int(index["headers"][member]):
                return False
    return True


def _make_index(path: Path) -> _Index:
    """Look through a tar file.

    Raises:
        RecipeError: It is none, is damaged or cut off, or holds what cannot be read by itself.
    """
    keys: list[str] = []
    starts: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    headers: list[int] = []
    extensions: list[str] = []
    seen: set[str] = set()
    for member, header in _members(path):
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not keys or keys[-1] != key:
            keys.append(key)
            starts.append(len(offsets))
            seen = set()
        if extension in seen:
            raise RecipeError(f"The shard {path} has {member.name} twice in one sample.")
        seen.add(extension)
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
    """Yield the files of a tar, each with the block of its header, to its end mark.

    Raises:
        RecipeError: It is no whole tar file.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
        except (tarfile.TarError, OSError) as error:
            raise RecipeError(
                f"{path} is no tar file that can be read from anywhere: {error}. Compressed ones "
                "have to be unpacked, `gunzip FILE.tar.gz`: their samples have no place of their "
                "own."
            ) from None
        size = path.stat().st_size
        try:
            for member in archive:
                if member.offset_data + member.size > size:
                    raise _damaged(path, member.offset, f"{member.name} is cut off")
                if not _is_content(path, member):
                    continue
                file.seek(member.offset_data - BLOCKSIZE)
                yield member, file.read(BLOCKSIZE)
        except (tarfile.TarError, OSError) as error:
            raise _damaged(path, archive.offset, str(error)) from None
        _check_end(path, file, archive.offset)


def _is_content(path: Path, member: tarfile.TarInfo) -> bool:
    """Return whether a member is a file; folders and the like are none.

    Raises:
        RecipeError: It is one whose content stands somewhere else.
    """
    if member.issym() or member.islnk() or member.issparse():
        kind = "sparse file" if member.issparse() else f"link to {member.linkname}"
        raise RecipeError(
            f"The shard {path} has {member.name} as a {kind}, at byte {member.offset:,}, whose "
            "content cannot be read there. Write the tar with `tar --hard-dereference "
            "--dereference` and without --sparse."
        )
    return member.isfile()


def _check_end(path: Path, file: IO[bytes], offset: int) -> None:
    """Refuse a tar that ends at `offset` in any other way than by its end mark.

    tarfile takes a damaged or cut header for the end, and so ends quietly there.

    Raises:
        RecipeError: There is no end mark, or more behind it.
    """
    file.seek(offset)
    block = file.read(BLOCKSIZE)
    if not block:
        raise _damaged(path, offset, "it has no end mark, so that files may be missing")
    if len(block) < BLOCKSIZE:
        raise _damaged(path, offset, "it ends in the middle of a header")
    if block.strip(b"\0"):
        raise _damaged(path, offset, "the header there is damaged")
    while piece := file.read(_READ_AT_ONCE):
        if piece.strip(b"\0"):
            at = file.tell() - len(piece.lstrip(b"\0"))
            raise _damaged(path, at, "it goes on behind its end mark, as tars that were joined do")
    if file.tell() - offset > _MOST_PADDING:
        raise _damaged(path, offset, "nothing but zeros follows, as in a file written in part")


def _damaged(path: Path, offset: int, what: str) -> RecipeError:
    return RecipeError(
        f"The shard {path} is no whole tar file: at byte {offset:,}, {what}. Copy it again, or "
        "leave it out of the files."
    )


def _keep_index(path: Path, index: _Index) -> None:
    """Keep an index for the next time; that it cannot be kept is no reason to fail."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with own.open("wb") as file:
            np.savez(file, **index)  # type: ignore[arg-type]
        own.replace(path)
    except OSError:
        own.unlink(missing_ok=True)
