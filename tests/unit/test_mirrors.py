"""Mirrors of run folders: what is uploaded in which order, what is removed, and who may write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import CheckpointError, RunDirError, StoreError
from launcher.mirrors import store_lock
from launcher.mirrors.inventory import list_records, upload_order
from launcher.mirrors.object_index import ObjectIndex
from launcher.mirrors.opened_url import OpenedURL, open_url
from launcher.mirrors.run_download import DownloadChoice, download_run
from launcher.mirrors.run_mirror import RunMirror
from launcher.mirrors.store_lock import LostLockError, StoreLock, read_lock
from launcher.mirrors.stored_runs import read_runs
from launcher.object_stores.object_store import ObjectStore
from launcher.runs.checkpoints import begin_checkpoint, commit_checkpoint, list_checkpoints
from launcher.runs.manifest import (
    FORMAT,
    FileDigest,
    Manifest,
    load_manifest,
    save_manifest,
    sum_file,
)
from launcher.runs.mirror_record import read_mirror
from launcher.runs.process_owner import ProcessOwner, this_process
from launcher.runs.rundir import RunDir

pytest.importorskip("fsspec")

SHARD = "shard-00001-model-00001-of-00001.safetensors"


class Store(ObjectStore):
    """A store in a folder that notes what is written and deleted, and fails as it is told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"file://{folder}", attempts=1)
        self.folder = folder
        self.calls: list[str] = []
        self.before: Callable[[str], object] = lambda _: None

    def write(self, name: str, content: bytes) -> None:
        self._note(f"write {name}")
        super().write(name, content)

    def delete(self, name: str) -> None:
        self._note(f"delete {name}")
        super().delete(name)

    def _note(self, call: str) -> None:
        self.before(call)
        self.calls.append(call)

    def take_calls(self) -> list[str]:
        """Return and forget what was called, without the index, the lock and the probe."""
        calls, self.calls = self.calls, []
        return [call for call in calls if not call.endswith((".json", ".lock")) or "/" in call]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return an empty store."""
    return Store(tmp_path / "store")


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """Make a run folder with a record, a log and what is not mirrored."""
    folder = tmp_path / "run"
    for name in ("logs", "health", "code/.github"):
        (folder / name).mkdir(parents=True)
    for name in ("run.yaml", "metrics.jsonl", "logs/rank0.log", "code/a.py", "code/.github/b"):
        (folder / name).write_text(name)
    for name in ("owner.lock", "mirror.json", ".x.1.tmp", "model.tmp", "health/rank0.json"):
        (folder / name).write_text("{}")
    (folder / "link").symlink_to("/etc/passwd")
    return RunDir(folder)


def save(run_dir: RunDir, step: int, content: bytes = b"weights") -> str:
    """Commit a checkpoint, and return its name."""
    folder = begin_checkpoint(run_dir, step)
    (folder / SHARD).write_bytes(content)
    manifest = Manifest(
        format=FORMAT,
        step=step,
        samples=step,
        world_size=1,
        agreement={},
        values={"optimizer": {}, "groups": [], "scaler": None},
        versions={},
        files={SHARD: sum_file(folder / SHARD)},
    )
    return commit_checkpoint(folder, manifest).name


def sums_of(folder: Path) -> dict[str, FileDigest]:
    """Return the digests of the files of a checkpoint."""
    return {path.name: sum_file(path) for path in folder.iterdir() if path.suffix != ".json"}


def opened(store: Store, *sessions: str) -> OpenedURL:
    """Take the URL of a store for this process."""
    return open_url(store, this_process(), sessions, lambda _: None)


def mirrored(store: Store, run_dir: RunDir, *sessions: str) -> tuple[RunMirror, str]:
    """Upload a run folder; return its mirror and the session."""
    url = opened(store, *sessions)
    mirror = url.mirror(run_dir)
    mirror.upload_records()
    mirror.upload_checkpoints()
    url.lock.release()
    return mirror, url.index.session


def download(store: Store, folder: Path, **choice: Any) -> RunDir:
    """Download what a store has."""
    return download_run(store, folder, DownloadChoice(**choice), lambda _: None)


def names_in(store: Store) -> set[str]:
    """Return the checkpoints that a store has committed."""
    return {name.split("/")[1] for name in store.list() if name.endswith("checkpoint.json")}


def test_records_are_the_lasting_regular_files(run_dir: RunDir) -> None:
    """Locks, heartbeats, links and files that are being written are no records; code is all."""
    assert set(list_records(run_dir)) == {
        *("run.yaml", "metrics.jsonl", "logs/rank0.log", "code/a.py", "code/.github/b")
    }


def test_the_result_is_uploaded_last(run_dir: RunDir) -> None:
    """run.yaml is uploaded first and result.json after everything else."""
    (run_dir.path / "result.json").write_text("{}")
    order = upload_order(list_records(run_dir))
    assert (order[0], order[-1]) == ("run.yaml", "result.json")


def test_an_index_has_both_contents_while_one_replaces_the_other() -> None:
    """During an upload the old and the new digest are listed, and no object for a new record."""
    index = ObjectIndex(session="s", files={"a": ("1",)})
    during = index.before({"a": "2", "b": "3"})
    assert during.files == {"a": ("1", "2"), "b": ("", "3")}
    assert not during.holds("a", "2")
    assert during.before({"a": "4"}).files["a"] == ("2", "4")
    assert during.after({"a": "2"}).files == {"a": ("2",), "b": ("", "3")}


def test_a_checkpoint_is_committed_by_its_manifest(store: Store, run_dir: RunDir) -> None:
    """checkpoint.json is written after the shards and deleted before them."""
    save(run_dir, 10)
    mirror, _ = mirrored(store, run_dir)
    folder = "checkpoints/step-00000010"
    assert store.take_calls()[-2:] == [
        f"write {folder}/{SHARD}",
        f"write {folder}/checkpoint.json",
    ]
    shutil.rmtree(run_dir.checkpoints / "step-00000010")
    save(run_dir, 20)
    mirror.upload_checkpoints()
    assert store.take_calls()[-2:] == [
        f"delete {folder}/checkpoint.json",
        f"delete {folder}/{SHARD}",
    ]
    assert names_in(store) == {"step-00000020"}
    assert mirror.stored_step == 20


def test_nothing_is_uploaded_twice(store: Store, run_dir: RunDir) -> None:
    """A second mirror of the same folder uploads what has changed, and nothing else."""
    save(run_dir, 10)
    _, session = mirrored(store, run_dir)
    store.take_calls()
    mirrored(store, run_dir, session)
    assert [call for call in store.take_calls() if "probe" not in call] == []
    with run_dir.metrics.open("a") as file:
        file.write("more")
    mirrored(store, run_dir, session)
    store.take_calls()
    assert store.read("metrics.jsonl") == b"metrics.jsonlmore"


def test_half_an_upload_is_done_again(store: Store, run_dir: RunDir, tmp_path: Path) -> None:
    """A checkpoint whose upload was killed does not exist, and is there after the next start."""
    save(run_dir, 10)
    _, session = mirrored(store, run_dir)
    save(run_dir, 20)

    def kill(call: str) -> None:
        if call == "write checkpoints/step-00000020/checkpoint.json":
            raise KeyboardInterrupt

    store.before = kill
    url = opened(store, session)
    with pytest.raises(KeyboardInterrupt):
        url.mirror(run_dir).upload_checkpoints()
    url.lock.release()
    assert f"checkpoints/step-00000020/{SHARD}" in store.list()
    (copy,) = list_checkpoints(download(store, tmp_path / "copy"))
    assert copy.step == 10
    store.before = lambda _: None
    mirrored(store, run_dir, session, url.index.session)
    assert names_in(store) == {"step-00000010", "step-00000020"}


def test_a_checkpoint_that_is_removed_meanwhile_is_left_out(store: Store, run_dir: RunDir) -> None:
    """When the run deletes a checkpoint while it is uploaded, none of it stays in the store."""
    save(run_dir, 10)
    save(run_dir, 20)
    (run_dir.checkpoints / "step-00000010" / "second").write_bytes(b"never read")
    folder = run_dir.checkpoints / "step-00000010"
    save_manifest(folder, replace(load_manifest(folder), files=sums_of(folder)))

    def prune(call: str) -> None:
        if call.startswith("write checkpoints/step-00000010/"):
            shutil.rmtree(folder, ignore_errors=True)

    store.before = prune
    mirror, _ = mirrored(store, run_dir)
    assert any("step-00000010" in call for call in store.calls)
    save(run_dir, 30)
    mirror.upload_checkpoints()
    assert names_in(store) == {"step-00000020", "step-00000030"}
    assert not any("step-00000010" in name for name in store.list())


def test_a_refused_resumption_removes_nothing(store: Store, run_dir: RunDir) -> None:
    """Checkpoints that are gone from the folder stay in the store until there is a new one."""
    for step in (10, 20, 30):
        save(run_dir, step)
    _, session = mirrored(store, run_dir)
    for step in (20, 30):
        shutil.rmtree(run_dir.checkpoints / f"step-{step:08}")
    _, session = mirrored(store, run_dir, session)
    assert names_in(store) == {"step-00000010", "step-00000020", "step-00000030"}


def test_what_was_deleted_while_the_store_was_down_is_removed(
    store: Store, run_dir: RunDir
) -> None:
    """An older checkpoint goes when the store gets a newer one that the folder had already."""
    save(run_dir, 10)
    _, session = mirrored(store, run_dir)
    shutil.rmtree(run_dir.checkpoints / "step-00000010")
    save(run_dir, 20)
    mirrored(store, run_dir, session)
    assert names_in(store) == {"step-00000020"}


def test_a_new_branch_replaces_the_one_that_was_given_up(store: Store, run_dir: RunDir) -> None:
    """A run that resumed before its newest checkpoint never leaves a later, older one there."""
    for step in (10, 20, 30):
        save(run_dir, step)
    _, session = mirrored(store, run_dir)
    for step in (20, 30):
        shutil.rmtree(run_dir.checkpoints / f"step-{step:08}")
    url = opened(store, session)
    mirror = url.mirror(run_dir)
    mirror.upload_records()
    save(run_dir, 20, b"others!")
    seen: list[set[str]] = []
    store.calls.clear()
    store.before = lambda _: seen.append(names_in(store))
    mirror.upload_checkpoints()
    assert names_in(store) == {"step-00000010", "step-00000020"}
    assert store.read(f"checkpoints/step-00000020/{SHARD}") == b"others!"
    committed = seen[
        store.calls.index("write checkpoints/step-00000020/checkpoint.json") - len(seen)
    ]
    assert committed == {"step-00000010"}


def test_a_download_is_the_run(store: Store, run_dir: RunDir, tmp_path: Path) -> None:
    """Records and the newest checkpoint arrive as they were, in a folder of this user alone."""
    save(run_dir, 10)
    save(run_dir, 20)
    _, session = mirrored(store, run_dir)
    copy = download(store, tmp_path / "a/copy")
    for name in list_records(run_dir):
        assert (copy.path / name).read_bytes() == (run_dir.path / name).read_bytes()
    (checkpoint,) = list_checkpoints(copy)
    manifest = checkpoint.read_manifest()
    assert checkpoint.step == 20
    assert list(checkpoint.find_damage(manifest.files, manifest)) == []
    assert copy.path.stat().st_mode & 0o077 == 0
    record = read_mirror(copy)
    assert record is not None
    assert (record.url, record.sessions) == (store.url, (session,))
    assert list_checkpoints(download(store, tmp_path / "b", checkpoint="10"))[0].step == 10
    assert not list_checkpoints(download(store, tmp_path / "c", leaves_out_checkpoints=True))
    with pytest.raises(CheckpointError, match="no checkpoint 15"):
        download(store, tmp_path / "d", checkpoint="15")
    with pytest.raises(RunDirError, match="exists already"):
        download(store, tmp_path / "b")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("how", ["flipped", "cut off", "missing"])
def test_a_corrupted_shard_is_named(
    store: Store, run_dir: RunDir, tmp_path: Path, how: str
) -> None:
    """A damaged checkpoint is refused by name, and the one before it is taken if that is asked."""
    save(run_dir, 10)
    save(run_dir, 20)
    mirrored(store, run_dir)
    shard = store.folder / f"checkpoints/step-00000020/{SHARD}"
    if how == "missing":
        shard.unlink()
    else:
        shard.write_bytes(b"Weights" if how == "flipped" else b"weig")
    with pytest.raises(CheckpointError, match=f"step-00000020 is damaged: {SHARD}") as caught:
        download(store, tmp_path / "copy")
    assert "--from step-00000010" in str(caught.value)
    assert not (tmp_path / "copy").exists()
    (copy,) = list_checkpoints(download(store, tmp_path / "copy", fall_back=True))
    assert copy.step == 10


def test_a_corrupted_record_is_named(store: Store, run_dir: RunDir, tmp_path: Path) -> None:
    """A damaged log is left out with a warning; without run.yaml or code there is no download."""
    mirrored(store, run_dir)
    (store.folder / "logs/rank0.log").write_text("LOGS/rank0.log")
    texts: list[str] = []
    copy = download_run(store, tmp_path / "copy", DownloadChoice(), texts.append)
    assert not copy.log(0).exists()
    assert [("logs/rank0.log" in text, "SHA-256" in text) for text in texts] == [(True, True)]
    for name in ("code/a.py", "run.yaml"):
        content = (store.folder / name).read_text()
        (store.folder / name).write_text("import os")
        with pytest.raises(StoreError, match=name):
            download(store, tmp_path / "other")
        (store.folder / name).write_text(content)
        assert not (tmp_path / "other").exists()


def test_names_that_lead_outside_are_ignored(store: Store, run_dir: RunDir, tmp_path: Path) -> None:
    """An index cannot make a download write outside its folder, or claim its lock."""
    mirrored(store, run_dir)
    index = json.loads(store.read("objects.json"))
    for name in ("../x", "/tmp/x", "a/../../x", "owner.lock", "checkpoints/step-1/x"):
        index["files"][name] = ["0"]
    store.write("objects.json", json.dumps(index).encode())
    texts: list[str] = []
    copy = download_run(store, tmp_path / "copy", DownloadChoice(), texts.append)
    assert set(list_records(copy)) == set(list_records(run_dir))
    assert texts == []


def test_a_url_has_one_run(store: Store, run_dir: RunDir, tmp_path: Path) -> None:
    """A URL with another run or other objects is refused, and so is an outdated run folder."""
    save(run_dir, 10)
    _, session = mirrored(store, run_dir)
    with pytest.raises(StoreError, match="holds a run already"):
        opened(store)
    elsewhere = download(store, tmp_path / "elsewhere")
    (elsewhere.path / "metrics.jsonl").write_text("further steps")
    _, later = mirrored(store, elsewhere, session)
    with pytest.raises(StoreError, match="continued from elsewhere"):
        opened(store, session)
    opened(store, session, later).lock.release()
    other = Store(tmp_path / "other")
    other.write("holiday.jpg", b"")
    with pytest.raises(StoreError, match=r"not empty.* holiday\.jpg"):
        opened(other)
    assert set(other.list()) == {"holiday.jpg"}


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    """A URL without write access, with an unknown protocol or without its package is refused."""
    for url, kind in (
        (f"file://{os.devnull}/x", "unanswered"),
        ("nowhere://bucket/run", "url"),
    ):
        with pytest.raises(StoreError) as caught:
            open_url(ObjectStore(url, attempts=1), this_process(), (), lambda _: None)
        assert caught.value.kind == kind


ELSEWHERE = replace(this_process(), host="node2", place="node2 boot 4026531836")


def locked(store: Store, owner: ProcessOwner) -> StoreLock:
    """Lock a store for a process, and return the lock."""
    lock = StoreLock(store, "theirs", owner)
    lock.acquire(None, lambda _: None)
    return lock


def test_the_lock_of_a_living_owner_is_respected(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of this machine is looked up; one of another is alive if it writes its lock."""
    living = replace(this_process(), since=1.0)
    lock = locked(store, living)
    ours = StoreLock(store, "ours", this_process())
    with pytest.raises(StoreError, match=f"{living.host}.*{living.pid}"):
        ours.acquire(None, lambda _: None)
    lock.release()
    lock = locked(store, ELSEWHERE)
    monkeypatch.setattr(store_lock, "_SECONDS_BETWEEN_LOOKS", 0.0)
    with pytest.raises(StoreError, match="in use: node2"):
        ours.acquire(None, lambda _: lock.refresh())
    assert read_lock(store) is not None


def test_the_lock_of_a_dead_owner_is_taken(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead process of this machine, and one whose lock is a minute old, no longer count."""
    ours = StoreLock(store, "ours", this_process())
    locked(store, replace(this_process(), pid=2**22 + 1))
    ours.acquire(None, pytest.fail)
    ours.release()
    lock = locked(store, ELSEWHERE)
    age = store.modified("mirror.lock")
    assert age is not None
    ours.acquire(age + 61, pytest.fail)
    with pytest.raises(LostLockError):
        lock.refresh()
    lock.release()
    ours.refresh()
    ours.release()
    assert "mirror.lock" not in store.list()
    locked(store, ELSEWHERE)
    monkeypatch.setattr(store_lock, "LEASE_SECONDS", 0.02)
    monkeypatch.setattr(store_lock, "_SECONDS_BETWEEN_LOOKS", 0.03)
    texts: list[str] = []
    ours.acquire(None, texts.append)
    assert len(texts) == 1


def test_the_lock_of_a_lost_session_is_taken(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock elsewhere counts no longer if its session is known to have ended, and else does."""
    monkeypatch.setattr(store_lock, "_SECONDS_BETWEEN_LOOKS", 0.0)
    lock = locked(store, ELSEWHERE)
    ours = StoreLock(store, "ours", this_process())
    with pytest.raises(StoreError, match="in use: node2"):
        ours.acquire(None, lambda _: lock.refresh(), lost=("others",))
    ours.acquire(None, pytest.fail, lost=("theirs",))
    with pytest.raises(LostLockError):
        lock.refresh()


def test_nothing_is_written_after_the_lock_was_lost(store: Store, run_dir: RunDir) -> None:
    """A mirror that has lost its URL leaves what the new owner has there."""
    mirror, _ = mirrored(store, run_dir)
    save(run_dir, 10)
    before = store.list()
    mirror.lose_lock()
    (run_dir.path / "metrics.jsonl").write_text("further steps")
    for upload in (mirror.upload_checkpoints, mirror.upload_records):
        with pytest.raises(StoreError, match="belongs to another process"):
            upload()
    assert store.list() == before


def test_runs_below_a_url_are_listed(store: Store, run_dir: RunDir) -> None:
    """Runs below a URL are found by their run.yaml, and show whether their lock is fresh."""
    (run_dir.path / "metrics.jsonl").write_bytes(b"x" * 100_000 + b"\n{}\n")
    for name in ("a", "b/c"):
        mirrored(Store(store.folder / name), run_dir)
    locked(Store(store.folder / "b/c"), ELSEWHERE)
    found = []
    for each in read_runs(store):
        found.append((each.url.removeprefix(store.url), each.is_owned))
        assert each.run_dir.metrics.stat().st_size == 100_004
        assert each.run_dir.metrics.read_bytes().endswith(b"x\n{}\n")
    assert found == [("/a", False), ("/b/c", True)]
    assert [each.url for each in read_runs(Store(store.folder / "a"))] == [f"{store.url}/a"]
