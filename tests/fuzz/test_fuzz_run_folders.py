"""Fuzzing of what lies on a disk: run folders, checkpoints and shards."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import yaml
from fuzz.damage import apply, copy_run, damages, files_of
from fuzz.harness import call, invoke
from fuzz.strategies import Change, broken_documents, changes, texts
from hypothesis import given
from hypothesis import strategies as st
from support import Commands

from launcher import Shards
from launcher.console.watch_screen import status_line, status_values
from launcher.launch.prepare import ResumeRequest, prepare_resume
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.failure_record import Failure
from launcher.runs.history import History
from launcher.runs.rundir import open_run_dir
from launcher.runs.status import read_run_state

COMMANDS = [
    ["runs"],
    ["runs", "--json"],
    ["runs", "--sort", "accuracy"],
    ["runs", "lr=0.1"],
    ["status"],
    ["status", "run"],
    ["status", "run", "--json"],
    ["report", "run"],
    ["report", "run", "other", "--out", "two.html"],
    ["plan", "digits", "--estimate", "run"],
]
"""Commands that read the run folders `run`, which is damaged, and `other`, which is not."""


@pytest.fixture(scope="module")
def finished(module_run: Commands) -> Path:
    """Return the folder of a finished run with two checkpoints and a submission."""
    settings = "steps=24", "checkpoint_every=12", "keep_checkpoints=2", "record_samples=true"
    ended = module_run("launcher", "run", "digits", "-n", "1", "-q", *settings, "--out", "finished")
    assert ended.exit_code == 0, ended.stderr
    folder = module_run.folder / "finished"
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return folder


def names_of(run: Path, *, checkpoints: bool) -> list[str]:
    """Return the files of the run's checkpoints, or all other files but its logs and page."""
    return [
        name
        for name in files_of(run)
        if name.startswith("checkpoints/") == checkpoints
        and not name.endswith((".log", ".html", ".safetensors"))
    ]


@given(data=st.data(), command=st.sampled_from(COMMANDS))
def test_run_folders(
    finished: Path, tmp_path: Path, data: st.DataObject, command: list[str]
) -> None:
    """Commands that read run folders name a damaged one and go on with the others."""
    damage = data.draw(damages(finished, names_of(finished, checkpoints=False)))
    apply(copy_run(finished, tmp_path), damage)
    with contextlib.suppress(FileExistsError):
        (tmp_path / "other").symlink_to(finished)
    ended = invoke(command, tmp_path)
    if command == ["runs"]:
        assert ended.exit_code == 0
        assert "other" in ended.stdout


@given(data=st.data())
def test_watching(finished: Path, tmp_path: Path, data: st.DataObject) -> None:
    """What `launcher watch` shows of a damaged folder is a line, or an error."""
    damage = data.draw(damages(finished, names_of(finished, checkpoints=False)))
    run = copy_run(finished, tmp_path)
    apply(run, damage)

    def show() -> None:
        run_dir = open_run_dir(run)
        history, state = History(run_dir), read_run_state(run_dir)
        assert status_line(history, state)
        assert status_values(history, state)

    call(show, tmp_path)


@given(data=st.data())
def test_resuming(finished: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A damaged run folder or checkpoint is resumed from, or refused before anything starts."""
    names = ["run.yaml", *names_of(finished, checkpoints=True)]
    run = copy_run(finished, tmp_path)
    apply(run, data.draw(damages(finished, names)))
    call(lambda: prepare_resume(ResumeRequest(run_dir=run, fall_back=True)), tmp_path)

    def verify() -> None:
        for checkpoint in list_checkpoints(open_run_dir(run)):
            manifest = checkpoint.read_manifest()
            list(checkpoint.find_unlisted(manifest))
            list(checkpoint.find_damage(list(manifest.files), manifest))

    call(verify, tmp_path)


def tar_of(num_samples: int) -> bytes:
    """Return a tar with two members for each sample."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index in range(num_samples):
            for kind in ("txt", "cls"):
                info = tarfile.TarInfo(f"{index:04}.{kind}")
                info.size = 5
                tar.addfile(info, io.BytesIO(b"hello"))
    return buffer.getvalue()


_TAR = tar_of(4)


@given(change=changes(len(_TAR)))
def test_shards(tmp_path: Path, change: Change) -> None:
    """A damaged shard is refused, or its first sample can be read."""
    (tmp_path / "shard.tar").write_bytes(change(_TAR))
    call(lambda: Shards(["shard.tar"])[0], tmp_path)


@given(content=broken_documents())
def test_what_is_not_a_shard(tmp_path: Path, content: bytes) -> None:
    """A file that is not a tar is refused."""
    (tmp_path / "shard.tar").write_bytes(content)
    assert call(lambda: Shards(["shard.tar"])[0], tmp_path) is not None


@given(text=texts(), command=st.sampled_from(COMMANDS))
def test_hostile_text(finished: Path, tmp_path: Path, text: str, command: list[str]) -> None:
    """Text that a run recorded reaches no terminal with control characters."""
    run = copy_run(finished, tmp_path)
    (run / "result.json").unlink()
    failure = Failure(
        rank=0, node=text, pid=1, time=1.0, error=text, message=text, traceback=text, exit_code=1
    )
    (run / "failure.json").write_text(json.dumps(failure.to_dict()))
    (run / "run.yaml").unlink()
    record = yaml.safe_load((finished / "run.yaml").read_text())
    record["recipe"] = record["plan"]["recipe"] = record["folder"] = text
    (run / "run.yaml").write_text(yaml.safe_dump(record))
    os.utime(run / "run.yaml", (1e9, 1e9))
    with contextlib.suppress(FileExistsError):
        (tmp_path / "other").symlink_to(finished)
    invoke(command, tmp_path)
