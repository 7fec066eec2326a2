"""One run on several nodes: how they meet, and that it trains like one process.

Each node is a launcher of its own on this machine; test_slurm.py has nodes with names of their own.
"""

from __future__ import annotations

import json
import platform
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from meeting_launchers import Launchers, has_peer, listens
from support import ROOT, Commands, Finished, has_rows, read_lines, wait_until

from launcher.engine.probes.parity import compare, read_trace
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir

WORLDS_PY = ROOT / "tests/recipes/worlds.py"

FAILING = ROOT / "tests/recipes/failing.py"


def start(
    run: Commands, port: int, *arguments: str | Path, ranks: int = 1
) -> subprocess.Popen[str]:
    """Start the launcher of one of two nodes."""
    return run.start(
        *("launcher", "run", *arguments, "-n", str(ranks), "--nodes", "2"),
        *("--rendezvous", f"localhost:{port}", "--out", "out", "device=cpu"),
    )


def run_both(run: Commands, port: int, *arguments: str | Path, ranks: int = 1) -> list[Finished]:
    """Run the launchers of two nodes to their end."""
    processes = [start(run, port, *arguments, ranks=ranks) for _ in range(2)]
    return [
        Finished(process.returncode, *output)
        for process in processes
        if (output := process.communicate(timeout=120))
    ]


def test_two_nodes_take_the_steps_of_one_process(run: Commands, free_port: int) -> None:
    """Samples, learning rates and counts are equal; losses and weights up to rounding.

    Each node holds a copy of the weights, which its ranks share.
    """
    settings = ("epochs=2", "record_samples=true")
    nodes = run_both(run, free_port, WORLDS_PY, *settings, "strategy=fsdp", ranks=2)
    assert [node.exit_code for node in nodes] == [0, 0], nodes
    (stdout,) = (node.stdout for node in nodes if node.stdout)
    assert "4 = 2 nodes x 2 CPU ranks" in stdout
    plan = yaml.safe_load((run.folder / "out/run.yaml").read_text())["plan"]
    assert (plan["strategy"], plan["shard_size"]) == ("fsdp", 2)
    assert "run folder: out" in stdout
    alone = run("launcher", "run", WORLDS_PY, *settings, "-n", "1", "--out", "alone")
    assert alone.exit_code == 0, alone.stderr
    expected, actual = (read_trace(RunDir(run.folder / name)) for name in ("alone", "out"))
    difference = compare(expected, actual, tolerance=1e-5)
    assert difference.agrees, difference
    logs = sorted(path.name for path in (run.folder / "out/logs").iterdir())
    assert logs == [f"rank{rank}.log" for rank in range(4)]


def test_one_node_shows_a_failure(run: Commands, free_port: int) -> None:
    """The node that failed prints the error; the other exits within seconds and names it."""
    nodes = run_both(run, free_port, FAILING, "how=raise", "rank=1")
    assert [node.exit_code for node in nodes] == [1, 1]
    failed, other = sorted((node.stderr for node in nodes), key=len, reverse=True)
    assert "the run failed on rank 1" in failed
    assert "ValueError: the loss of rank one" in failed
    assert other.startswith("launcher: ")
    assert platform.node() in other
    assert len(other.splitlines()) == 1


def test_a_lost_node_ends_the_run(run: Commands, free_port: int) -> None:
    """When the launcher of one node is killed, the other node exits and names the cause."""
    processes = [start(run, free_port, WORLDS_PY, "epochs=400") for _ in range(2)]
    run_dir = RunDir(run.folder / "out")
    wait_until(lambda: has_rows(run_dir, 2), *processes)
    processes[1].kill()
    processes[1].communicate()
    _, stderr = processes[0].communicate(timeout=120)
    # After the first evaluation there is a checkpoint, from which the run can be resumed.
    assert processes[0].returncode == (75 if list_checkpoints(run_dir) else 1)
    # The killed node may have kept the rendezvous, which is called by its address.
    assert re.search(rf"\b({platform.node()}|localhost|rank \d)\b", stderr), stderr


@pytest.mark.parametrize("index", [0, 1])
def test_a_launcher_that_stands_still_is_lost(run: Commands, free_port: int, index: int) -> None:
    """The run ends without a stopped launcher, which ends with the same code when it continues.

    Neither that of the first node, which has the store served, nor another keeps the others
    waiting. Only the stopped one names the seconds for which it stood still.
    """
    nodes = Launchers(run, free_port, "--nodes", "2", "--node-timeout", "4", steps=100_000)
    nodes.start_in_order(2)
    nodes.wait_for_step(7)
    stopped = nodes.launcher_of(index)
    (other,) = (each for each in nodes.processes if each is not stopped)
    stopped.send_signal(signal.SIGSTOP)
    try:
        other.wait(timeout=120)
    finally:
        stopped.send_signal(signal.SIGCONT)
    assert nodes.finish() == [75, 75], nodes.outputs
    for process, (_, stderr) in zip(nodes.processes, nodes.outputs, strict=True):
        assert stderr.count("\n") == 1, stderr
        stood_still = re.search(r" \d+ s\b", stderr) is not None
        assert stood_still == (process is stopped), stderr


def test_a_stop_on_one_node_stops_both(run: Commands, free_port: int) -> None:
    """SIGTERM to one launcher stops both with a checkpoint, which resumes on one node."""
    processes = [start(run, free_port, WORLDS_PY, "epochs=400") for _ in range(2)]
    run_dir = RunDir(run.folder / "out")
    wait_until(lambda: has_rows(run_dir, 2), *processes)
    processes[0].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    (checkpoint, *_) = list_checkpoints(run_dir)
    done = run("launcher", "resume", "out", "-n", "1", f"steps={checkpoint.step + 5}")
    assert done.exit_code == 0, done.stderr
    assert json.loads(run_dir.result.read_text())["steps"] == checkpoint.step + 5


@pytest.mark.parametrize("restarts", [0, 1])
@pytest.mark.parametrize("index", [0, 1])
def test_a_stop_ends_a_node_that_waits(
    run: Commands, free_port: int, index: int, restarts: int
) -> None:
    """A launcher that waits for others can be stopped, and its exit code says that it may resume.

    That may be the first one or one that has joined it; nothing is written.
    """
    command = (
        *("launcher", "run", WORLDS_PY, "-n", "1", "--nodes", "3", "--max-restarts", str(restarts)),
        *("--rendezvous", f"localhost:{free_port}", "--out", "out", "device=cpu"),
    )
    first = run.start(*command)
    wait_until(lambda: listens(first.pid), first)
    second = run.start(*command)
    wait_until(lambda: has_peer(second.pid), first, second)
    processes = [first, second]
    processes[index].send_signal(signal.SIGTERM)
    processes[index].wait(timeout=60)
    processes[1 - index].send_signal(signal.SIGUSR1)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert processes[index].returncode == 75, outputs
    assert processes[1 - index].returncode in {1, 75}, outputs  # 1: it has missed the other first
    assert not (run.folder / "out").exists()


def test_a_node_that_does_not_join_ends_the_run(run: Commands, free_port: int) -> None:
    """After --join-timeout the run is refused, and no run folder exists."""
    done = run(
        *("launcher", "run", WORLDS_PY, "-n", "1", "--nodes", "2", "--join-timeout", "1"),
        *("--rendezvous", f"localhost:{free_port}", "--out", "out"),
    )
    assert done.exit_code == 2
    assert "1 s for 1 of 2 nodes" in done.stderr
    assert not (run.folder / "out").exists()


def test_nodes_that_run_something_else_are_refused(run: Commands, free_port: int) -> None:
    """Nodes with different numbers of ranks are refused with both numbers, before any write."""
    processes = [start(run, free_port, WORLDS_PY, ranks=ranks) for ranks in (1, 2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    for stderr in errors:
        counts = re.search(r"ranks: \S+ has (\d), \S+ has (\d)\.", stderr)
        assert counts is not None, stderr
        assert sorted(counts.groups()) == ["1", "2"]
    assert not (run.folder / "out").exists()


def test_continue_starts_or_resumes(run: Commands) -> None:
    """`run --continue` starts a run, resumes it the next time, and needs --out."""
    command = ("launcher", "run", WORLDS_PY, "-n", "1", "--out", "out", "--continue")
    assert run(*command, "steps=3").exit_code == 0
    done = run(*command, "steps=6")
    assert done.exit_code == 0, done.stderr
    assert "resumed from step-00000003" in done.stdout
    steps = [line["step"] for line in read_lines(run.folder / "out/metrics.jsonl")]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
    refused = run("launcher", "run", WORLDS_PY, "--continue")
    assert refused.exit_code == 2
    assert "--out" in refused.stderr
