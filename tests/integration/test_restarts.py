"""Runs on several nodes that restart when a rank or a launcher is lost.

Each node is a launcher of its own on this machine; test_ssh.py and test_slurm.py lose whole nodes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from typing import Any

import pytest
from meeting_launchers import Launchers, check_equal, has_peer, train_undisturbed
from support import ROOT, Commands, read_lines, read_weights, wait_until

from launcher.engine.probes.parity import compare, read_trace
from launcher.runs.history import History
from launcher.runs.rundir import RunDir


@pytest.fixture(scope="module")
def undisturbed_run(module_run: Commands) -> RunDir:
    """Return the folder of a run on two nodes that nothing disturbs."""
    return train_undisturbed(module_run)


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run: RunDir) -> dict[str, Any]:
    """Return the final weights of that run."""
    return read_weights(undisturbed_run.path)


def test_a_lost_rank_restarts_in_place(
    run: Commands, free_port: int, undisturbed: dict[str, Any]
) -> None:
    """After a rank is killed, both nodes go on from a checkpoint to the same weights."""
    both = Launchers(run, free_port, "--nodes", "2", "--max-restarts", "1")
    both.start_in_order(2)
    both.wait_for_step(12)
    os.kill(both.pid_of(1), signal.SIGKILL)
    assert both.finish() == [0, 0], both.outputs
    check_equal(both.run_dir, undisturbed)
    (recovered,) = both.events("recovered")
    assert (recovered["cause"], recovered["nodes"]) == ("rank", 2)
    assert recovered["step"] in (6, 11, 16)
    assert 0 < recovered["seconds"] < 60
    (failed,) = both.events("failed")
    assert (failed["rank"], failed["error"]) == (1, "Death")
    attempts = History(both.run_dir).attempts()
    assert [type(each.ended).__name__ for each in attempts] == ["Failed", "Finished"]


def test_a_spare_takes_the_place_of_a_lost_launcher(
    run: Commands, free_port: int, undisturbed: dict[str, Any]
) -> None:
    """After a launcher is killed, the spare goes on in its place, to the same weights."""
    three = Launchers(run, free_port, "--nodes", "2", "--spares", "1", "--max-restarts", "2")
    three.start_in_order(3)
    three.wait_for_step(12)
    lost = three.launcher_of(1)
    lost.kill()
    codes = three.finish()
    assert sorted(codes) == [-signal.SIGKILL, 0, 0], three.outputs
    check_equal(three.run_dir, undisturbed)
    (recovered,) = three.events("recovered")
    assert (recovered["cause"], recovered["nodes"]) == ("node", 2)
    (failed,) = three.events("failed")
    assert (failed["error"], failed["node"]) == ("LostNode", recovered["node"])


def test_a_successor_takes_the_place_of_the_first_launcher(
    run: Commands, free_port: int, undisturbed: dict[str, Any]
) -> None:
    """After the launcher that holds the meeting is killed, another one holds it."""
    three = Launchers(run, free_port, "--nodes", "2", "--spares", "1", "--max-restarts", "2")
    three.start_in_order(3)
    three.wait_for_step(12)
    first = three.launcher_of(0)
    assert first is three.processes[0]
    first.kill()
    assert three.finish() == [-signal.SIGKILL, 0, 0], three.outputs
    check_equal(three.run_dir, undisturbed)
    assert [each["cause"] for each in three.events("recovered")] == ["node"]


def test_a_run_goes_on_with_fewer_nodes(
    run: Commands, free_port: int, undisturbed_run: RunDir
) -> None:
    """With --nodes 1:2 a run goes on without a lost launcher, and computes what two nodes compute.

    The samples are equal. One rank adds up in another order than two, so the losses and the final
    weights differ by rounding.
    """
    both = Launchers(run, free_port, "--nodes", "1:2", "--max-restarts", "2")
    both.start_in_order(2)
    both.wait_for_step(12)
    both.launcher_of(1).kill()
    assert both.finish() == [0, -signal.SIGKILL], both.outputs
    (recovered,) = both.events("recovered")
    assert recovered["nodes"] == 1
    result = json.loads(both.run_dir.result.read_text())
    assert result["steps"] == 40
    steps = [row["step"] for row in read_lines(both.run_dir.metrics) if "loss" in row]
    assert sorted(set(steps)) == list(range(1, 41))
    difference = compare(read_trace(undisturbed_run), read_trace(both.run_dir), tolerance=1e-4)
    assert difference.agrees, difference


def test_a_first_launcher_that_was_cut_off_changes_nothing(run: Commands, free_port: int) -> None:
    """The launcher that owns the run folder starts no round if others have started a later one.

    What they leave in the folder is written by hand here: one machine has one lock for all.
    """
    both = Launchers(run, free_port, "--nodes", "1:2", "--max-restarts", "2", steps=100_000)
    both.start_in_order(2)
    both.wait_for_step(7)
    both.run_dir.round.write_text("2\n")
    both.launcher_of(1).kill()
    assert both.finish() == [2, -signal.SIGKILL], both.outputs
    assert both.run_dir.round.read_text() == "2\n"
    assert both.events("recovered") == []


def test_a_node_joins_later(run: Commands, free_port: int) -> None:
    """A launcher that is started later takes part after the next checkpoint."""
    one = Launchers(run, free_port, "--nodes", "1:2", "--max-restarts", "1", steps=100_000)
    one.start_in_order(2)
    one.wait_for_step(7)
    one.launcher_of(1).kill()
    one.wait_for_recoveries(1)
    one.start()
    one.wait_for_recoveries(2)
    one.processes[0].send_signal(signal.SIGTERM)
    assert one.finish() == [75, -signal.SIGKILL, 75], one.outputs
    assert [(row["cause"], row["nodes"]) for row in one.events("recovered")] == [
        ("node", 1),
        ("joined", 2),
    ]


def test_nodes_that_would_run_something_else_are_refused(run: Commands, free_port: int) -> None:
    """Nodes with other numbers of ranks are refused with both numbers, before any write."""
    both = Launchers(run, free_port, "--nodes", "2", "--max-restarts", "1")
    both.start_in_order(1)
    both.start("-n", "2")
    assert both.finish() == [2, 2], both.outputs
    for _, stderr in both.outputs:
        assert "the same ranks: " in stderr
        assert "Traceback" not in stderr
    assert not both.run_dir.path.exists()


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, for a namespace"
)
def test_a_spare_takes_the_place_of_a_node_that_is_not_fit(run: Commands, free_port: int) -> None:
    """With --health, a node without /dev/shm is left out before its ranks start, and recorded."""
    options = ("--nodes", "2", "--spares", "1", "--max-restarts", "1", "--health", "quick")
    three = Launchers(run, free_port, *options, pause=0)
    three.start_in_order(1)
    script = ROOT / "tests/no_shared_memory.sh"
    line = f'hostname unfit; bash {script} dev; exec "$@"'
    three.start(before=("unshare", "-m", "--uts", "bash", "-c", line, "bash"))
    wait_until(lambda: has_peer(three.processes[1].pid), *three.processes)
    three.start()
    assert three.finish() == [0, 1, 0], three.outputs
    assert three.outputs[1][1].count("unfit is not fit for the run. /dev/shm: ") == 1
    assert three.run_dir.unhealthy_nodes.read_text() == "unfit\n"
    assert [row["cause"] for row in three.events("recovered")] == ["health"]


def test_too_few_nodes_end_the_run(run: Commands, free_port: int) -> None:
    """Without a spare, a run whose node is lost ends with a code that says it can be resumed."""
    both = Launchers(run, free_port, "--nodes", "2", "--max-restarts", "2")
    both.start_in_order(2)
    both.wait_for_step(12)
    both.launcher_of(1).kill()
    codes = both.finish()
    assert codes == [75, -signal.SIGKILL], both.outputs
    assert both.outputs[0][1].count("has disappeared") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_fails_twice_is_left_out(run: Commands, free_port: int, rank: int) -> None:
    """After two failures of a node the spare takes its place, and jobs are told to avoid it.

    That holds for the node whose launcher holds the meeting as well.
    """
    three = Launchers(run, free_port, "--nodes", "2", "--spares", "1", "--max-restarts", "3")
    three.start_in_order(3)
    three.wait_for_step(7)
    failing = three.launcher_of(rank)
    for restarts in (0, 1):
        three.wait_for_recoveries(restarts)
        os.kill(three.pid_of(rank), signal.SIGKILL)
    codes = dict(zip((each.pid for each in three.processes), three.finish(), strict=True))
    assert codes.pop(failing.pid) == 200, three.outputs
    assert list(codes.values()) == [0, 0], three.outputs
    (name,) = {row["node"] for row in three.events("recovered")}
    assert three.run_dir.unhealthy_nodes.read_text() == f"{name}\n"


def test_restarts_are_counted(run: Commands, free_port: int) -> None:
    """After --max-restarts restarts the next failure ends the run, and is shown once."""
    both = Launchers(run, free_port, "--nodes", "2", "--max-restarts", "1")
    both.start_in_order(2)
    for step in (7, 17):
        both.wait_for_step(step)
        os.kill(both.pid_of(1), signal.SIGKILL)
    assert both.finish() == [1, 1], both.outputs
    errors = [stderr for _, stderr in both.outputs]
    assert sum(text.count("logs/rank1.log") for text in errors) == 1, errors


def test_a_stop_ends_spares_too(run: Commands, free_port: int) -> None:
    """SIGTERM to one launcher saves a checkpoint, and all launchers leave."""
    three = Launchers(run, free_port, "--nodes", "2", "--spares", "1", "--max-restarts", "1")
    three.start_in_order(3)
    three.wait_for_step(7)
    three.launcher_of(0).send_signal(signal.SIGTERM)
    assert three.finish() == [75, 75, 75], three.outputs
    assert [each["event"] for each in read_lines(three.run_dir.events)][-1] == "stopped"
