"""Nodes that are examined before their ranks start: `--health`."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from support import ROOT, Commands

from launcher.errors import EXIT_FAILED
from launcher.runs.rundir import RunDir

DIGITS = ("digits", "-n", "1", "steps=2", "num_workers=0", "device=cpu", "--out", "out")


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, for a namespace"
)
def test_a_run_does_not_start_on_a_node_that_is_not_fit(run: Commands) -> None:
    """A node without /dev/shm ends the run before its ranks start, and is recorded."""
    line = f'bash {ROOT}/tests/no_shared_memory.sh dev; exec launcher run "$@" --health quick'
    done = run("unshare", "-m", "bash", "-c", line, "bash", *DIGITS)
    assert done.exit_code == EXIT_FAILED, done.stdout
    assert "/dev/shm: it does not exist" in done.stderr
    run_dir = RunDir(run.folder / "out")
    recorded = json.loads(run_dir.failure.read_text())
    assert (recorded["error"], recorded["rank"]) == ("HealthError", 0)
    assert run_dir.unhealthy_nodes.read_text() == f"{os.uname().nodename}\n"
    assert not run_dir.metrics.exists()


def test_a_healthy_node_trains(run: Commands) -> None:
    """With --health=full ranks examine the node, and the run then takes its steps."""
    done = run("launcher", "run", *DIGITS, "--health", "full")
    assert done.exit_code == 0, done.stderr
    assert not RunDir(run.folder / "out").unhealthy_nodes.exists()


PROGRAM = """
import json
import sys
from pathlib import Path

from launcher.findings import failure
from launcher.errors import HealthError
from launcher.launch.prepare import RunRequest, prepare_run
from launcher.launch.session import start
from launcher.launch.signal_handler import library_signals
from launcher.recipe.overrides import read_arguments
from launcher.recipe.resolve import resolve

examinations = []


def check(plan, out, signals, keep_alive, *, is_restart):
    assert (plan.world_size, out) == (1, Path.cwd() / "out")
    assert signals.stopped_by is None
    keep_alive()
    examinations.append(is_restart)
    return [failure("GPU health", "it has gone", "replace it")] if len(examinations) > 2 else []


request = RunRequest(
    reference=resolve(sys.argv[1]),
    overrides=read_arguments(("how=raise", "rank=0", "device=cpu")),
    nproc_per_node=1,
    out=Path.cwd() / "out",
    max_restarts=5,
    output_mode="quiet",
    health=check,
)
try:
    with library_signals() as signals:
        start(prepare_run(request), signals)
except HealthError as error:
    print(json.dumps([examinations, str(error)]))
"""


def test_a_node_is_examined_before_each_restart(run: Commands) -> None:
    """A node is examined before the first attempt and before each restart, and may fail later."""
    (run.folder / "program.py").write_text(PROGRAM)
    done = run("python", "program.py", str(ROOT / "tests/recipes/failing.py"))
    assert done.exit_code == 0, done.stderr
    examinations, error = json.loads(done.stdout.splitlines()[-1])
    assert examinations == [False, True, True]
    assert "it has gone" in error
