"""Tests of files at URLs and their cache on the local disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from range_server import RangeServer, serve

from launcher import RecipeError, RemoteCache, SampleError
from launcher.engine.data import remote
from launcher.engine.data.data_files import DataFiles
from launcher.engine.data.remote import download, read_range, read_version

DOWNLOAD = """
import sys
from launcher import RemoteCache
from launcher.engine.data.data_files import DataFiles

files = DataFiles([sys.argv[1]], RemoteCache(folder=sys.argv[2]))
print(len(files.read(0, files.size(0), 0)))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    """Yield a server of three files of 100,000 bytes each."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name in ("a.bin", "b.bin", "c.bin"):
        (folder / name).write_bytes(name[:1].encode() * 100_000)
    with serve(folder) as server:
        yield server


def cached(folder: Path) -> list[str]:
    """Return the names of the files in a cache."""
    return sorted(path.name.partition("-")[2][:1] for path in folder.glob("*.data"))


def test_a_file_is_downloaded_once_and_read_anywhere(server: RangeServer, tmp_path: Path) -> None:
    """A file is requested once, is read at any position, and is found by the next process."""
    cache = RemoteCache(folder=tmp_path / "cache")
    for _ in range(2):
        files = DataFiles([f"{server.url}/a.bin?signature=1", f"{server.url}/b.bin"], cache)
        assert [files.size(number) for number in range(2)] == [100_000, 100_000]
        assert files.read(1, 3, 99_997) == b"bbb"
        assert server.requests == {"b.bin": 1}
        assert cached(tmp_path / "cache") == ["b"]
    assert "signature" not in files.name(0)
    with pytest.raises(SampleError, match="gave 3"):
        files.read(1, 4, 99_997)


def test_a_file_is_downloaded_in_blocks(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that arrive together are the file, also from a server that ignores ranges."""
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 30_000)
    content = bytes(index * 7 % 251 for index in range(100_000))
    (server.folder / "a.bin").write_bytes(content)
    url = f"{server.url}/a.bin"
    for ignores_ranges in (False, True):
        server.ignores_ranges = ignores_ranges
        cache = RemoteCache(folder=tmp_path / str(ignores_ranges))
        assert download(url, read_version(url, cache), cache).read_bytes() == content
    assert server.requests == {"a.bin": 8}


def test_the_least_recently_used_files_make_room(server: RangeServer, tmp_path: Path) -> None:
    """The cache holds as many bytes as it may, and the file that was used last stays."""
    cache = RemoteCache(folder=tmp_path / "cache", max_bytes=250_000)
    urls = [f"{server.url}/{name}.bin" for name in "abc"]
    versions = [read_version(url, cache) for url in urls]
    first, second = (
        download(url, version, cache) for url, version in zip(urls[:2], versions, strict=False)
    )
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    download(urls[0], versions[0], cache)
    download(urls[2], versions[2], cache)
    assert cached(tmp_path / "cache") == ["a", "c"]
    assert server.requests == {"a.bin": 1, "b.bin": 1, "c.bin": 1}
    with pytest.raises(RecipeError, match="max_bytes"):
        download(urls[1], versions[1], RemoteCache(folder=cache.folder, max_bytes=99_999))


def test_a_file_that_is_removed_from_the_cache_stays_readable(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader goes on with a file that another process removed, and fetches it again later."""
    cache = RemoteCache(folder=tmp_path / "cache")
    files = DataFiles([f"{server.url}/a.bin"], cache)
    files.read(0, 1, 0)
    next((tmp_path / "cache").glob("*.data")).unlink()
    assert files.read(0, 2, 50_000) == b"aa"
    assert server.requests == {"a.bin": 1}
    monkeypatch.setattr("launcher.engine.data.data_files._RECHECK_SECONDS", 0.0)
    assert files.read(0, 2, 50_000) == b"aa"
    assert server.requests == {"a.bin": 2}


def test_processes_of_a_node_download_a_file_once(server: RangeServer, tmp_path: Path) -> None:
    """Two processes that need a file at the same time request it once."""
    (server.folder / "large.bin").write_bytes(bytes(8 << 20))
    server.stall = 0.3
    command = [sys.executable, "-c", DOWNLOAD, f"{server.url}/large.bin", str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == [f"{8 << 20}\n"] * 2
    assert server.requests == {"large.bin": 1}


def test_a_process_that_was_killed_leaves_nothing_in_the_way(
    server: RangeServer, tmp_path: Path
) -> None:
    """A download that ended early is done again, and its remains are removed to make room."""
    cache = RemoteCache(folder=tmp_path / "cache", max_bytes=150_000)
    urls = [f"{server.url}/{name}.bin" for name in "ab"]
    path = download(urls[0], read_version(urls[0], cache), cache)
    path.rename(path.with_suffix(".part"))
    download(urls[1], read_version(urls[1], cache), cache)
    assert [each.suffix for each in cache.path.iterdir() if each.suffix != ".lock"] == [".data"]


@pytest.mark.parametrize("failure", ["statuses", "cut_off", "stall"])
def test_passing_failures_are_survived(server: RangeServer, tmp_path: Path, failure: str) -> None:
    """A request is repeated after a server error, a cut-off answer and a silent connection."""
    cache = RemoteCache(folder=tmp_path / "cache", timeout_seconds=0.3)
    value = {"statuses": [503, 429], "cut_off": 1, "stall": 1.0}[failure]
    setattr(server, failure, value)
    files = DataFiles([f"{server.url}/a.bin"], cache)
    assert files.read(0, 100_000, 0) == b"a" * 100_000
    assert server.requests["a.bin"] == {"statuses": 3, "cut_off": 2, "stall": 2}[failure]


def test_a_store_that_stays_unreachable_is_named(server: RangeServer, tmp_path: Path) -> None:
    """After the last attempt, the error names the object, without its signature."""
    cache = RemoteCache(folder=tmp_path / "cache", attempts=2)
    url = f"{server.url}/a.bin?signature=secret"
    version = read_version(url, cache)
    server.cut_off = 100
    with pytest.raises(SampleError, match=r"a\.bin could not be read in 2 attempts") as caught:
        download(url, version, cache)
    assert "signature" not in str(caught.value)
    assert server.requests == {"a.bin": 2}
    assert list(cache.path.glob("*.part")) == []
    with pytest.raises(SampleError, match="could not be read in 1"):
        read_version("http://127.0.0.1:9/a.bin", RemoteCache(attempts=1, timeout_seconds=0.5))


def test_missing_and_forbidden_files_are_refused_at_once(server: RangeServer) -> None:
    """404 and 403 are errors of the recipe, without further attempts."""
    with pytest.raises(RecipeError, match=r"no file at .*missing\.bin \(404\)"):
        DataFiles([f"{server.url}/a.bin", f"{server.url}/missing.bin"])
    with pytest.raises(RecipeError, match=r"secret\.bin is denied \(403\)"):
        DataFiles([f"{server.url}/secret.bin"])
    assert sum(server.requests.values()) <= 2


def test_a_replaced_file_is_refused(server: RangeServer, tmp_path: Path) -> None:
    """A file that is replaced during a run is refused, and a new run reads the new one."""
    cache = RemoteCache(folder=tmp_path / "cache")
    url = f"{server.url}/a.bin"
    files = DataFiles([url], cache)
    (server.folder / "a.bin").write_bytes(b"A" * 100_000)
    with pytest.raises(RecipeError, match="version has changed"):
        files.read(0, 1, 0)
    assert DataFiles([url], cache).read(0, 1, 0) == b"A"


def test_a_cache_that_cannot_be_written_is_refused(server: RangeServer, tmp_path: Path) -> None:
    """A cache folder that is a file or has no room raises a RecipeError that names it."""
    (tmp_path / "file").write_bytes(b"")
    for folder, text in ((tmp_path / "file", "file"), (Path("/dev/full/x"), "/dev/full")):
        files = DataFiles([f"{server.url}/a.bin"], RemoteCache(folder=folder))
        with pytest.raises(RecipeError, match=text):
            files.read(0, 1, 0)


def test_other_stores_are_read_through_fsspec(tmp_path: Path) -> None:
    """Any file system of fsspec serves, such as its own in memory; unknown ones are refused."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/bucket/a.bin", b"0123456789")
    cache = RemoteCache(folder=tmp_path / "cache")
    url = "memory://bucket/a.bin"
    assert read_range(url, 2, 5, cache) == b"234"
    assert DataFiles([url], cache).read(0, 3, 7) == b"789"
    with pytest.raises(RecipeError, match="nowhere"):
        DataFiles(["nowhere://bucket/a.bin"], cache)
