"""What is said of a rank that ended without a word."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from launcher.console.failure import death_text
from launcher.runs.heartbeat import Heartbeat
from launcher.runs.rundir import RunDir


@pytest.mark.parametrize(
    ("exit_code", "oom_kills", "words"),
    [
        (-9, 1, "was killed by SIGKILL: host memory ran out (the cgroup counts 1 such"),
        (-9, 0, "was killed by SIGKILL (not for want of memory"),
        (
            -9,
            None,
            "was killed by SIGKILL (the kernel does that when memory runs out: see `dmesg`)",
        ),
        (-7, 0, "was killed by SIGBUS (a full /dev/shm has this effect"),
        (-11, 0, "was killed by SIGSEGV"),
        (139, 0, "ended with exit code 139 (SIGSEGV)"),
        (3, 0, "ended with exit code 3\n"),
    ],
)
def test_exit_codes_in_words(
    tmp_path: Path, exit_code: int, oom_kills: int | None, words: str
) -> None:
    """Signals have their names, and those that memory causes say so where the kernel counts."""
    text = death_text(1, exit_code, RunDir(tmp_path), oom_kills=oom_kills)
    assert text.startswith(f"launcher: the run failed: rank 1 {words}")


def test_where_the_ranks_were(tmp_path: Path) -> None:
    """Every rank's last word is in the block, in order, and many are summed up."""
    run_dir = RunDir(tmp_path)
    run_dir.health(0).parent.mkdir()
    for rank in range(18):
        health = Heartbeat(
            rank=rank, node="n", pid=1, step=rank, phase="computing", since=0.0, time=0.0
        )
        run_dir.health(rank).write_text(json.dumps(asdict(health)))
    text = death_text(3, 1, run_dir)
    assert "last seen: rank 0: step 0, computing; rank 1: step 1, computing; " in text
    assert "rank 15: step 15, computing; and 2 more, see " in text


def test_the_line_of_the_log(tmp_path: Path) -> None:
    """The log is named with the last line that the rank wrote."""
    run_dir = RunDir(tmp_path)
    run_dir.log(2).parent.mkdir()
    run_dir.log(2).write_text("one\ntwo\nthree\n")
    assert death_text(2, -11, run_dir).endswith(f"log: {run_dir.log(2)}, line 3")
