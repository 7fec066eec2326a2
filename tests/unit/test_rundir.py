"""The run folder is created once, and its files are written completely or not at all."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from launcher.errors import RunDirError
from launcher.runs.files import write_atomic, write_json, write_yaml
from launcher.runs.output_file import check_output, write_output
from launcher.runs.rundir import create_run_dir, find_run_dirs, open_run_dir
from launcher.yaml_file import read_yaml_file


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


def test_what_becomes_of_an_existing_run_is_said(tmp_path: Path) -> None:
    """`launcher resume` is named for the folder of a run that has a checkpoint, and no other."""
    (tmp_path / "run.yaml").touch()
    with pytest.raises(RunDirError, match="its run saved no checkpoint"):
        create_run_dir(tmp_path, "x")
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    with pytest.raises(RunDirError, match="launcher resume"):
        create_run_dir(tmp_path, "x")


def test_a_folder_of_runs_is_told_from_a_run(tmp_path: Path) -> None:
    """Where a folder holds runs, as that of a sweep does, the error names one of them."""
    (tmp_path / "sweep/0").mkdir(parents=True)
    with pytest.raises(RunDirError) as caught:
        open_run_dir(tmp_path / "sweep")
    assert "sweep/0" not in str(caught.value)
    (tmp_path / "sweep/0/run.yaml").touch()
    with pytest.raises(RunDirError) as caught:
        open_run_dir(tmp_path / "sweep")
    assert "sweep/0" in str(caught.value)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """A failed write leaves the old content, and no temporary file."""
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RunDirError, match="File too large"):
            write_atomic(path, "x" * 1001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_a_link_to_itself_hides_no_run(tmp_path: Path) -> None:
    """Runs are found beside links that lead to themselves, to nothing, or back to the folder."""
    for name in ("a", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text("recipe: x\n")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nothing").symlink_to("/no/such/folder")
    assert [run.path.name for run in find_run_dirs(tmp_path)] == ["a", "z"]


def test_arguments_of_any_bytes_can_be_read_again(tmp_path: Path) -> None:
    """A YAML file holds the characters or the escapes of names that a locale cannot decode."""
    path = tmp_path / "run.yaml"
    write_yaml(path, {"command": ["r\udcc3\udcbcns/a", "caf\udce9", "\ud800"]})
    assert read_yaml_file(path).value == {"command": ["rüns/a", r"caf\xe9", r"\ud800"]}


def test_links_and_pipes_in_a_run_folder_are_replaced(tmp_path: Path) -> None:
    """A write replaces a link or a FIFO of the same name; the target of the link is unchanged."""
    (tmp_path / "file").write_text("kept")
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to("file")
    os.mkfifo(pipe)
    for path in (link, pipe):
        write_atomic(path, "text")
        assert path.is_file()
        assert not path.is_symlink()
        assert path.read_text() == "text"
    assert (tmp_path / "file").read_text() == "kept"


def test_an_output_file_is_written_through_links_and_pipes(tmp_path: Path) -> None:
    """A link that a user names keeps its place and its target changes; a pipe gets the text."""
    (tmp_path / "file").touch()
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to("file")
    write_output(link, "text")
    assert link.is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_output(pipe, "text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_file_of_somebody_else_is_replaced_only_by_force(tmp_path: Path) -> None:
    """A file that launcher did not write is refused without `force`; an empty one is not."""
    path = tmp_path / "page.html"
    check_output(path, lambda _: False, force=False)
    path.touch()
    check_output(path, lambda _: False, force=False)
    path.write_text("mine")
    check_output(path, lambda head: head == b"mine", force=False)
    check_output(path, lambda _: False, force=True)
    with pytest.raises(RunDirError, match="--force"):
        check_output(path, lambda _: False, force=False)
