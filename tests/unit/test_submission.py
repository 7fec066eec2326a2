"""Submitted runs whose scheduler does not answer."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from damaged_run import write_failure, write_finished_run
from fuzz.harness import invoke

from launcher.runs.events import record_event
from launcher.runs.files import write_json
from launcher.runs.heartbeat import Heartbeat
from launcher.runs.mirror_record import MirrorRecord, write_mirror
from launcher.runs.rundir import RunDir
from launcher.schedulers.run_states import list_statuses, status_of


def run_on_another_node(run_dir: RunDir) -> None:
    """Make the run one whose ranks wrote a heartbeat a moment ago on another machine."""
    run_dir.result.unlink()
    now = time.time()
    beat = Heartbeat(
        rank=0, node=f"not-{platform.node()}", pid=1, step=12, phase="saving", since=now, time=now
    )
    write_json(run_dir.health(0), asdict(beat))


def stop(run_dir: RunDir) -> None:
    run_dir.result.unlink()
    record_event(run_dir, "stopped", step=12)


def wait(run_dir: RunDir) -> None:
    run_dir.result.unlink()
    run_dir.run_yaml.unlink()


STATES: dict[str, Callable[[RunDir], object]] = {
    "finished": lambda _: None,
    "failed": write_failure,
    "running": run_on_another_node,
    "stopped": stop,
    "lost": lambda run_dir: run_dir.result.unlink(),
    "waiting": wait,
}


@pytest.mark.parametrize("state", STATES)
def test_without_slurm_the_folder_tells_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """While Slurm does not answer, the state of a submitted run is that of its folder."""
    monkeypatch.setenv("PATH", str(tmp_path))  # without scontrol
    run_dir = write_finished_run(tmp_path / "run")
    os.utime(run_dir.run_yaml, (1e9, 1e9))
    STATES[state](run_dir)
    assert status_of(run_dir).state == state
    assert [status.state for status in list_statuses(tmp_path)] == [state]
    ended = invoke(["status", "run", "--json"], tmp_path)
    assert ended.exit_code == 0
    assert json.loads(ended.stdout)["state"] == state


def test_uploads_that_fail_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status of a run tells why its object store lacks something, and what it has."""
    monkeypatch.setenv("PATH", str(tmp_path))  # without squeue
    run_dir = write_finished_run(tmp_path / "run")
    record = MirrorRecord(url="s3://me:key@bucket/run?key=1", stored_step=1200)
    write_mirror(run_dir, record)
    assert status_of(run_dir).mirror_problem == ""
    write_mirror(run_dir, replace(record, problem="the store denied access"))
    (row,) = json.loads(invoke(["status", "--json"], tmp_path).stdout)
    problem = row["mirror_problem"]
    assert all(text in problem for text in ("s3://bucket/run", "1,200", "denied access"))
    assert "key" not in problem
    assert row["words"].startswith("finished after ")
    for arguments in (["status"], ["status", "run"]):
        assert invoke(arguments, tmp_path).stdout.endswith(f"; {problem}\n")
