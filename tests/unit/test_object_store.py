"""Objects on a real S3 server on loopback: written completely, created once, read in parts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_store import S3Store, serve_s3

from launcher.errors import StoreError
from launcher.object_stores import object_store
from launcher.object_stores.object_store import ObjectStore

pytest.importorskip("s3fs")
pytest.importorskip("flask_cors")
pytest.importorskip("moto")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Store]:
    """Run a server that this process reaches by its environment."""
    with serve_s3() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def store(server: S3Store) -> ObjectStore:
    """Return the objects below a URL of the server, which has no faults."""
    server.proxy.heal()
    return ObjectStore("s3://bucket/run")


def test_an_object_is_created_once(store: ObjectStore, server: S3Store) -> None:
    """Of two that create an object one succeeds, also when the answer to it was lost."""
    assert store.create("lock", b"mine")
    assert not store.create("lock", b"theirs")
    server.proxy.lost_answers = 1
    assert store.create("other", b"mine")
    assert (store.read("lock"), store.read("other")) == (b"mine", b"mine")
    store.delete("lock")
    store.delete("lock")
    assert set(store.list()) == {"other"}


def test_large_files_are_uploaded_in_parts(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that grows the first bytes are uploaded, and read back in blocks as they were."""
    monkeypatch.setattr(object_store, "_PART_BYTES", 5 << 20)
    monkeypatch.setattr(object_store, "_BLOCK_BYTES", 4 << 20)
    content = os.urandom(11 << 20)
    for name in ("rank0.log", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
    store.upload("rank0.log", tmp_path / "rank0.log", (11 << 20) - 9)
    store.upload("model.safetensors", tmp_path / "model.safetensors", 11 << 20)
    digest = store.download("rank0.log", (11 << 20) - 9, tmp_path / "copy")
    assert digest == hashlib.sha256(content[:-9]).hexdigest()
    assert (tmp_path / "copy").read_bytes() == content[:-9]
    assert store.read("model.safetensors") == content


def test_requests_are_bounded(store: ObjectStore, server: S3Store, tmp_path: Path) -> None:
    """A request is tried so often and no more; one that is denied or missing is tried once."""
    bounded = ObjectStore(store.url, attempts=2)
    server.proxy.write_statuses = [500]
    bounded.write("a", b"1")
    server.proxy.write_statuses = [503] * 9
    with pytest.raises(StoreError, match="in 2 attempts"):
        bounded.write("a", b"2")
    assert len(server.proxy.write_statuses) == 7
    server.proxy.heal()
    for name, kind in (("missing", "missing"), ("secret", "denied")):
        with pytest.raises(StoreError) as caught:
            store.download(name, 1, tmp_path / name)
        assert (caught.value.kind, server.proxy.requests[name] <= 1) == (kind, True)


def test_a_url_is_shown_without_its_secrets() -> None:
    """Neither a password nor a signature is in an error."""
    url = "ftp://me:hidden@nowhere.invalid/run?signature=hidden"
    assert ObjectStore(url).shown == "ftp://nowhere.invalid/run"
