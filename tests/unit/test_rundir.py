"""The run folder is created once, and its files are written completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.errors import RunDirError
from launcher.runs.rundir import (
    create_run_dir,
    write_atomic,
    write_json,
)


def test_default_folders_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that start in the same second get different folders."""
    monkeypatch.chdir(tmp_path)
    run_dirs = [create_run_dir(None, "digits") for _ in range(3)]
    assert len({run_dir.path for run_dir in run_dirs}) == 3
    assert all(run_dir.shown.startswith("runs/digits-") for run_dir in run_dirs)


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    """A run folder that exists, even an empty one, is refused and stays as it is."""
    with pytest.raises(RunDirError, match=str(tmp_path)):
        create_run_dir(tmp_path, "digits")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """A failed write leaves the old content, and no temporary file."""
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_links_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    """A write through a link changes its target, and a write to a pipe goes through the pipe."""
    (tmp_path / "file").touch()
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to("file")
    write_atomic(link, "text")
    assert link.is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, "text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
