"""Links inside a run folder: what a run writes stays in its folder."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from damaged_run import write_failure, write_finished_run
from fuzz.harness import invoke

from launcher.engine.ranks.output import Log
from launcher.engine.ranks.watchdog import Watchdog
from launcher.errors import RunDirError
from launcher.recipe.hang_limits import hang_limits
from launcher.runs.events import record_event
from launcher.runs.failure_record import read_failure, record_failure, replace_failure
from launcher.runs.files import set_file_aside
from launcher.runs.ownership import check_unowned, own_run_dir
from launcher.runs.run_record import read_run, write_resumption
from launcher.runs.rundir import RunDir, truncate_after, write_error
from launcher.schedulers.submission import read_submission
from launcher.signals import StopRequest


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """Write the folder of a run that has failed."""
    run_dir = write_finished_run(tmp_path / "run")
    write_failure(run_dir)
    return run_dir


def own(run_dir: RunDir) -> None:
    check_unowned(run_dir.path)
    with pytest.raises(RunDirError, match="symbolic link"), own_run_dir(run_dir):
        pytest.fail("the folder was owned")


def log(run_dir: RunDir) -> None:
    reports: list[str] = []
    with Log(run_dir.log(0), reports.append) as file:
        file.write("text\n")
    assert len(reports) == 1


def beat(run_dir: RunDir) -> None:
    stream = io.StringIO()
    Watchdog(
        run_dir, 0, 1, limits=hang_limits(None), stop=StopRequest(), log=stream, errors=stream
    ).close()


def fail(run_dir: RunDir) -> None:
    failure = read_failure(run_dir)
    assert failure is not None
    record_failure(run_dir, failure)
    replace_failure(run_dir, failure)


def report(run_dir: RunDir) -> None:
    assert invoke(["report", "run"], run_dir.path.parent).exit_code == 0


def submit(run_dir: RunDir) -> None:
    read_submission(run_dir).save(run_dir)


WRITES: dict[str, Callable[[RunDir], object]] = {
    "run.yaml": lambda run_dir: write_resumption(run_dir, read_run(run_dir)),
    "events.jsonl": lambda run_dir: record_event(run_dir, "finished", step=1),
    "metrics.jsonl": lambda run_dir: truncate_after(run_dir, 3),
    "owner.lock": own,
    "logs/rank0.log": log,
    "health/rank0.json": beat,
    "health/rank0.tmp": beat,
    "failure.json": fail,
    ".failure.NODE.PID.tmp": fail,
    "report.html": report,
    "submission.json": submit,
    ".probe.PID.tmp": write_error,
}
"""What writes each file of a run folder."""


@pytest.mark.parametrize("name", WRITES)
def test_a_file_that_is_a_link_is_not_written_through(run_dir: RunDir, name: str) -> None:
    """A link in place of a file is replaced, set aside or refused; its target stays as it is."""
    own_name = name.replace("NODE", os.uname().nodename).replace("PID", str(os.getpid()))
    path, target = run_dir.path / own_name, run_dir.path.parent / "target"
    if path.exists():
        path.rename(target)
    else:
        target.write_text("theirs")
    path.symlink_to(target)
    before = target.read_bytes()
    WRITES[name](run_dir)
    assert target.read_bytes() == before


@pytest.mark.parametrize("name", ["logs", "health", "checkpoints", "samples", "traces"])
@pytest.mark.parametrize("exists", [True, False], ids=["to a folder", "to nothing"])
def test_a_folder_that_is_a_link_is_refused(run_dir: RunDir, name: str, *, exists: bool) -> None:
    """A run does not start in a folder that has a link in place of one of its folders."""
    path, target = run_dir.path / name, run_dir.path.parent / "target"
    if path.exists():
        set_file_aside(path)
    if exists:
        target.mkdir()
    path.symlink_to(target)
    with pytest.raises(RunDirError, match=f"{path} is a symbolic link"), own_run_dir(run_dir):
        pytest.fail("the folder was owned")
    path.unlink()
    with own_run_dir(run_dir):
        assert run_dir.owner.stat().st_size > 0
    assert not exists or list(target.iterdir()) == []


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_an_owner_that_is_no_file_is_refused(
    run_dir: RunDir, make: Callable[[Path], object]
) -> None:
    """A FIFO or a folder in place of owner.lock is one error with its name, and blocks nothing."""
    run_dir.owner.unlink()
    make(run_dir.owner)
    check_unowned(run_dir.path)
    with pytest.raises(RunDirError, match=r"owner\.lock"), own_run_dir(run_dir):
        pytest.fail("the folder was owned")
