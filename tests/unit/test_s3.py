"""Tests of data on S3: a real S3 server on loopback that fails, restarts and replaces objects."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from s3_store import S3Store, serve_s3
from support import wait_until

from launcher import ParquetRows, RecipeError, SampleError, TokenFiles
from launcher.engine.data import remote
from launcher.engine.data.data_files import DataFiles
from launcher.engine.data.remote import read_version

pytest.importorskip("s3fs")
pytest.importorskip("flask_cors")
pytest.importorskip("moto")

SIZE = 300_000
CONTENT = (np.arange(SIZE) * 7 % 251).astype(np.uint8).tobytes()
BLOCK = 100_000

DOWNLOAD = """
import json, sys
from launcher import RemoteCache
from launcher.engine.data import remote
from launcher.engine.data.data_files import DataFiles

remote._BLOCK_BYTES = 100_000
url, folder, options = sys.argv[1:]
files = DataFiles([url], RemoteCache(folder=folder, options=json.loads(options)))
print(sum(files.read(0, files.size(0), 0)), flush=True)
"""


@pytest.fixture(scope="module")
def one_store() -> Iterator[S3Store]:
    """Run a server for all tests of this module."""
    with serve_s3() as store:
        yield store


@pytest.fixture
def store(one_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """Return the server without faults; downloads are made of blocks of 100,000 bytes."""
    monkeypatch.setattr(remote, "_BLOCK_BYTES", BLOCK)
    one_store.put("a.bin", CONTENT)
    one_store.proxy.heal()
    return one_store


def test_stores_are_read_from_s3(store: S3Store, tmp_path: Path) -> None:
    """Rows and tokens on S3 are those of local files, downloaded when they are needed."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"n": list(range(100))}), tmp_path / "a.parquet", row_group_size=30)
    url = store.put("a.parquet", (tmp_path / "a.parquet").read_bytes())
    cache = store.cache(tmp_path / "cache")
    rows = ParquetRows([url], cache=cache)
    assert rows.chunks == [30, 30, 30, 10]
    assert [int(row["n"]) for row in rows.__getitems__([99, 0, 31])] == [99, 0, 31]
    assert rows.file_of(99) == url
    tokens = TokenFiles("s3://bucket/a.bin", block=9, token_type="uint8", cache=cache)
    assert tokens[3][0].tolist() == list(CONTENT[27:36])
    assert len(list((tmp_path / "cache").glob("*.data"))) == 2


def test_missing_and_forbidden_objects_are_refused_at_once(store: S3Store, tmp_path: Path) -> None:
    """404 and 403 are errors that name the object, without further attempts."""
    cache = store.cache(tmp_path / "cache")
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"no file at s3://bucket/missing\.bin"):
        DataFiles(["s3://bucket/missing.bin"], cache)
    with pytest.raises(RecipeError, match=r"s3://bucket/secret\.bin is denied \(403\)"):
        DataFiles(["s3://bucket/secret.bin"], cache)
    with pytest.raises(RecipeError, match=r"no file at s3://nowhere/a\.bin"):
        DataFiles(["s3://nowhere/a.bin"], cache)
    assert time.monotonic() - started < 5


def test_a_replaced_object_is_refused(store: S3Store, tmp_path: Path) -> None:
    """An object of the same size that is put in its place during a run is refused by its URL."""
    cache = store.cache(tmp_path / "cache")
    files = DataFiles(["s3://bucket/a.bin"], cache)
    store.put("a.bin", CONTENT[::-1])
    with pytest.raises(RecipeError, match=r"s3://bucket/a\.bin .* version has changed"):
        files.read(0, 1, 0)
    assert list(cache.path.glob("*.data")) == []
    assert DataFiles(["s3://bucket/a.bin"], cache).read(0, SIZE, 0) == CONTENT[::-1]


@pytest.mark.parametrize(
    ("fault", "value"),
    [("statuses", [503, 500]), ("cut_off", 2), ("stalls", [1.0, 1.0])],
)
def test_passing_failures_are_survived(
    store: S3Store, tmp_path: Path, fault: str, value: object
) -> None:
    """Server errors, cut-off answers and silent connections cost further requests of a block."""
    setattr(store.proxy, fault, value)
    files = DataFiles(["s3://bucket/a.bin"], store.cache(tmp_path, timeout_seconds=0.3))
    assert files.read(0, SIZE, 0) == CONTENT
    assert store.proxy.requests["a.bin"] == SIZE // BLOCK + 2


def test_a_store_that_keeps_failing_is_named(store: S3Store, tmp_path: Path) -> None:
    """Requests are bounded, and the error after the last one names the object."""
    files = DataFiles(["s3://bucket/a.bin"], store.cache(tmp_path, attempts=2))
    store.proxy.statuses = [500] * 100
    with pytest.raises(SampleError, match=r"s3://bucket/a\.bin could not be read in 2 attempts"):
        files.read(0, 1, 0)
    assert store.proxy.requests["a.bin"] <= 12
    assert list(tmp_path.glob("*.data")) == list(tmp_path.glob("*.part")) == []


def test_a_restart_of_the_store_is_survived(store: S3Store, tmp_path: Path) -> None:
    """A read that begins while the server is down succeeds after its restart."""
    files = DataFiles(["s3://bucket/a.bin"], store.cache(tmp_path))
    store.stop()
    restart = threading.Timer(1.0, store.start)
    restart.start()
    try:
        started = time.monotonic()
        assert files.read(0, SIZE, 0) == CONTENT
        assert time.monotonic() - started > 0.9
    finally:
        restart.join()


def test_a_process_that_is_killed_while_it_downloads_hands_over(
    store: S3Store, tmp_path: Path
) -> None:
    """After kill -9 in the middle of a download, the process that waits for it does it again."""
    folder = tmp_path / "cache"
    command = [sys.executable, "-c", DOWNLOAD, "s3://bucket/a.bin", str(folder)]
    command.append(json.dumps(store.options))
    store.proxy.stalls = [0.0, 60.0]  # the second block stops in its middle
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: store.proxy.requests["a.bin"] == 2, first)
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: _waits_for_a_lock(second.pid), first, second)
    (part,) = folder.glob("*.part")
    assert part.stat().st_size == SIZE  # others count it in full
    assert list(folder.glob("*.data")) == []
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert second.communicate(timeout=60)[0] == f"{sum(CONTENT)}\n"
    assert store.proxy.requests["a.bin"] == 2 + SIZE // BLOCK
    (kept,) = folder.glob("*.data")
    assert kept.read_bytes() == CONTENT
    assert list(folder.glob("*.part")) == []


def _waits_for_a_lock(process: int) -> bool:
    """Return whether a process waits for a file lock, as the kernel tells."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f" {process} " in line for line in lines)


MOUNTED = """
set -e
mount -t tmpfs -o size=200k none "$1"
[ "$2" = full ] || mount -o remount,ro "$1"
exec "$3" -c "$4" "$5" "$1" "$6"
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode != 0,
    reason="needs namespaces, to mount a small disk",
)
@pytest.mark.parametrize(
    ("kind", "message"), [("full", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_cache_that_is_full_or_read_only_is_named(
    store: S3Store, tmp_path: Path, kind: str, message: str
) -> None:
    """A disk that is too small or mounted read-only ends the read with the folder's name."""
    done = subprocess.run(
        [
            *("unshare", "-rm", "sh", "-c", MOUNTED, "sh", tmp_path, kind, sys.executable),
            *(DOWNLOAD, "s3://bucket/a.bin", json.dumps(store.options)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    error = done.stderr.strip().splitlines()[-1]
    assert f"The cache folder {tmp_path} cannot hold s3://bucket/a.bin: {message}." in error


def test_versions_are_those_of_the_store(store: S3Store, tmp_path: Path) -> None:
    """The version of an object is its ETag, and changes with its content."""
    cache = store.cache(tmp_path)
    before = read_version("s3://bucket/a.bin", cache)
    store.put("a.bin", CONTENT[::-1])
    after = read_version("s3://bucket/a.bin", cache)
    assert (before.size, after.size) == (SIZE, SIZE)
    assert before.tag != after.tag
