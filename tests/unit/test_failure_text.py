"""The text about a failed run."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launcher.console.failure import death_text, failure_text, failure_with_log
from launcher.runs.failure_record import Failure
from launcher.runs.heartbeat import Heartbeat
from launcher.runs.rundir import RunDir


@pytest.mark.parametrize(
    ("exit_code", "oom_kills", "pattern"),
    [
        (-9, 1, r"SIGKILL: .*memory ran out .* 1 .*num_workers"),
        (-9, 0, r"SIGKILL \(memory did not run out"),
        (-9, None, r"SIGKILL .*dmesg"),
        (-7, 0, r"SIGBUS .*/dev/shm"),
        (-11, 0, r"SIGSEGV$"),
        (139, 0, r"139 \(SIGSEGV\)$"),
        (3, 0, r"3$"),
    ],
)
def test_the_cause_of_a_death_is_named(
    tmp_path: Path, exit_code: int, oom_kills: int | None, pattern: str
) -> None:
    """A signal is shown by name, with its usual cause, and the kernel's count decides on memory."""
    text = death_text(1, exit_code, RunDir(tmp_path), oom_kills=oom_kills)
    (head, *_) = text.splitlines()
    assert re.match(rf"launcher: the run failed: rank 1 .*{pattern}", head)


def test_the_last_step_of_each_rank_is_shown(tmp_path: Path) -> None:
    """The text lists the last step of the first 16 ranks in order, and counts the others."""
    run_dir = RunDir(tmp_path)
    run_dir.health(0).parent.mkdir()
    for rank in range(18):
        heartbeat = Heartbeat(
            rank=rank, node="n", pid=1, step=rank, phase="computing", since=0.0, time=0.0
        )
        run_dir.health(rank).write_text(json.dumps(asdict(heartbeat)))
    text = death_text(3, 1, run_dir)
    assert "last seen: rank 0: step 0, computing; rank 1: step 1, computing; " in text
    assert "rank 15: step 15, computing; and 2 more, see " in text


def test_a_death_points_at_the_last_line_of_the_log(tmp_path: Path) -> None:
    """The text names the log of the rank that died, with the number of its last line."""
    run_dir = RunDir(tmp_path)
    run_dir.log(2).parent.mkdir()
    run_dir.log(2).write_text("one\ntwo\nthree\n")
    assert death_text(2, -11, run_dir).endswith(f"log: {run_dir.log(2)}, line 3")


def test_a_recorded_failure_is_shown(tmp_path: Path) -> None:
    """The text has rank, node, traceback and log line; a user's mistake is its message alone."""
    run_dir = RunDir(tmp_path)
    failure = Failure(
        rank=3,
        node="node2",
        pid=1,
        time=0.0,
        error="ValueError",
        message="no loss",
        traceback="Traceback ...\nValueError: no loss\n",
        exit_code=1,
        log_line=7,
    )
    text = failure_text(failure, run_dir)
    assert text.splitlines()[0].endswith("rank 3 (node2)")
    assert "\n\nTraceback ...\nValueError: no loss\n\n" in text
    assert text.endswith(f"log: {run_dir.log(3)}, line 7")
    assert failure_text(replace(failure, exit_code=2), run_dir) == "launcher: no loss"


def test_the_log_of_a_folder_that_will_be_removed_is_quoted(tmp_path: Path) -> None:
    """The text about a death has the last lines of the log, and does not name its file."""
    run_dir = RunDir(tmp_path)
    run_dir.log(0).parent.mkdir()
    run_dir.log(0).write_bytes(b"".join(b"line %d \xff\n" % number for number in range(10_000)))
    failure = Failure(
        rank=0, node="n", pid=1, time=0.0, error="Death", message="it died", exit_code=1
    )
    text = failure_with_log(failure, run_dir)
    assert "it died" in text
    assert "\nline 9960 \\xff\n" in text
    assert text.endswith("line 9999 \\xff")
    assert "line 9959" not in text
    assert str(run_dir.log(0)) not in text
    assert "line" not in failure_with_log(replace(failure, traceback="Traceback ..."), run_dir)


def test_a_failure_text_commands_no_terminal(tmp_path: Path) -> None:
    """Control characters in a failure that somebody else wrote are shown as escapes."""
    failure = Failure(
        rank=0,
        node="n\x1b[2J",
        pid=1,
        time=0.0,
        error="ValueError",
        message="\x1b]0;owned\x07" * 100_000,
        exit_code=1,
    )
    for text in (
        failure_text(failure, RunDir(tmp_path)),
        failure_with_log(failure, RunDir(tmp_path)),
    ):
        assert "\x1b" not in text
        assert "\\x1b]0;owned\\x07" in text
        assert len(text) < 100_000
