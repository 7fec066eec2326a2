"""The run folder: made once, written whole."""

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
    """Runs that start in the same second get folders of their own."""
    monkeypatch.chdir(tmp_path)
    made = [create_run_dir(None, "digits") for _ in range(3)]
    assert len({run_dir.path for run_dir in made}) == 3
    assert all(run_dir.shown.startswith("runs/digits-") for run_dir in made)


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    """A run folder that is there, even empty, is refused."""
    with pytest.raises(RunDirError, match="exists already"):
        create_run_dir(tmp_path, "digits")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """Text that cannot be written leaves what was there, and no file beside it."""
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    """A link still leads to its file, and a pipe is written to rather than replaced."""
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
