"""failure.json: the first failure of a run, kept and read back."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import RunDirError
from launcher.runs.events import Failed, read_events, record_past_failure
from launcher.runs.failure_record import (
    FAILURE_FILE_VARIABLE,
    Failure,
    find_failure,
    read_failure,
    record_failure,
    replace_failure,
)
from launcher.runs.rundir import RunDir
from launcher.runs.status import read_run_state

FAILURE = Failure(
    rank=1,
    node="node2",
    pid=4242,
    time=1_800_000_000.5,
    error="ValueError",
    message="the loss of rank one",
    traceback="Traceback ...",
    exit_code=1,
    log_line=12,
)

DAMAGES = {
    "no rank": ({"rank": None}, "rank"),
    "rank is a text": ({"rank": "one"}, r"\$\.rank"),
    "exit code is a text": ({"exit_code": "1"}, r"\$\.exit_code"),
    "lost_peer is a number": ({"lost_peer": 1}, r"\$\.lost_peer"),
}


@pytest.mark.parametrize(
    "failure",
    [
        FAILURE,
        replace(FAILURE, log_line=None, lost_peer=True, out_of_memory=True, traceback=""),
        replace(FAILURE, message="caf\u00e9 \udcff \x00 \u2028", traceback="\ud800"),
    ],
    ids=["all fields", "defaults", "lone surrogates"],
)
def test_a_failure_is_read_as_it_was_written(tmp_path: Path, failure: Failure) -> None:
    """A failure survives the file unchanged, whatever its message is made of."""
    run_dir = RunDir(tmp_path)
    assert read_failure(run_dir) is None
    assert record_failure(run_dir, failure) == "first"
    assert read_failure(run_dir) == failure


def test_only_the_first_failure_is_kept(tmp_path: Path) -> None:
    """A second failure changes nothing, and its rank learns that it was not the first."""
    run_dir = RunDir(tmp_path)
    assert record_failure(run_dir, FAILURE) == "first"
    assert record_failure(run_dir, replace(FAILURE, rank=0)) == "later"
    assert read_failure(run_dir) == FAILURE
    assert [entry.name for entry in tmp_path.iterdir()] == ["failure.json"]


def test_a_consequence_is_replaced_by_its_cause(tmp_path: Path) -> None:
    """The launcher overwrites the failure of a rank that had only lost its peer."""
    run_dir = RunDir(tmp_path)
    assert record_failure(run_dir, replace(FAILURE, lost_peer=True)) == "first"
    replace_failure(run_dir, FAILURE)
    assert read_failure(run_dir) == FAILURE


def test_a_failure_without_a_folder_goes_to_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank whose run folder is gone leaves its failure in the file that the launcher named."""
    monkeypatch.setenv(FAILURE_FILE_VARIABLE, str(tmp_path / "failure1.json"))
    gone = RunDir(tmp_path / "gone")
    assert record_failure(gone, FAILURE) == "first"
    assert find_failure(gone, tmp_path / "failure1.json") == FAILURE
    monkeypatch.setenv(FAILURE_FILE_VARIABLE, str(tmp_path / "gone/failure1.json"))
    assert record_failure(gone, FAILURE) == "unwritten"


@pytest.mark.parametrize(("changes", "field"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_failure_names_its_file_and_field(
    tmp_path: Path, changes: dict[str, object], field: str
) -> None:
    """A value that is missing or of the wrong type is named with the file that holds it."""
    values = FAILURE.to_dict() | changes
    kept = {name: value for name, value in values.items() if value is not None}
    (tmp_path / "failure.json").write_text(json.dumps(kept))
    with pytest.raises(RunDirError, match=rf"failure\.json.*{field}"):
        read_failure(RunDir(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_damaged_failure_hides_nothing(tmp_path: Path, content: bytes) -> None:
    """A run with an unreadable failure.json counts as failed, and can be resumed."""
    run_dir = RunDir(tmp_path)
    run_dir.failure.write_bytes(content)
    os.utime(run_dir.failure, (1000.0, 1000.0))
    with pytest.raises(RunDirError, match=r"failure\.json"):
        read_failure(run_dir)
    assert find_failure(run_dir, tmp_path / "none.json") is None
    state = read_run_state(run_dir)
    assert state.name == "failed"
    assert "failure.json" in state.words
    record_past_failure(run_dir)
    (event,) = read_events(run_dir)
    assert isinstance(event, Failed)
    assert (event.time, event.rank) == (1000.0, None)
    assert "failure.json" in event.message
    assert not run_dir.failure.exists()


def test_a_failure_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Fields that earlier versions lack have defaults; fields of later versions are ignored."""
    optional = ("traceback", "out_of_memory", "lost_peer", "log_line")
    values = {name: value for name, value in FAILURE.to_dict().items() if name not in optional}
    (tmp_path / "failure.json").write_text(json.dumps(values | {"device": "cuda:0"}))
    assert read_failure(RunDir(tmp_path)) == replace(FAILURE, traceback="", log_line=None)


def test_a_past_failure_becomes_an_event(tmp_path: Path) -> None:
    """When a run starts again, failure.json is moved to the events with the time it had."""
    run_dir = RunDir(tmp_path)
    record_past_failure(run_dir)
    assert read_events(run_dir) == []
    assert record_failure(run_dir, FAILURE) == "first"
    record_past_failure(run_dir)
    assert not run_dir.failure.exists()
    assert read_events(run_dir) == [
        Failed(
            time=FAILURE.time,
            rank=1,
            node="node2",
            error="ValueError",
            message="the loss of rank one",
        )
    ]
