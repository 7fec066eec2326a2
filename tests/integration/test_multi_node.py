"""One run on several machines: who meets whom, and that nothing but the place is different.

The machines are launchers of their own, in one network; tests/test_slurm.py has nodes.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
from support import ROOT, Commands, Finished, read_lines

from launcher.engine.probes.parity import compare, read_trace
from launcher.environment.nodes import find_nodes
from launcher.environment.slurm_step import find_step, read_counts, read_hosts
from launcher.environment.world import find_world
from launcher.errors import UsageError, WorldError
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir

WORLDS_PY = ROOT / "tests/recipes/worlds.py"
FAILING = ROOT / "tests/recipes/failing.py"

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "gpu[008-010]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("gpu[008-010,21],login1", ["gpu008", "gpu009", "gpu010", "gpu21", "login1"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
        ("a[1-2]-ib,b", ["a1-ib", "a2-ib", "b"]),
    ],
)
def test_slurms_list_of_nodes_is_read(text: str, hosts: list[str]) -> None:
    """In its order, with the zeros of its numbers."""
    assert list(read_hosts(text)) == hosts


def test_slurms_counts_are_read() -> None:
    """Repeated numbers are written as n(xTIMES)."""
    assert read_counts("2(x3),1") == (2, 2, 2, 1)
    with pytest.raises(ValueError, match="many"):
        read_counts("many")


def test_a_step_of_slurm_is_found() -> None:
    """One launcher on each node; steps and jobs have ports of their own."""
    nodes = find_nodes(None, None, env=STEP)
    assert nodes is not None
    assert (nodes.count, nodes.index, nodes.host) == (3, 2, "gpu008")
    assert nodes.names == ("gpu008", "gpu009", "gpu010")
    others = [STEP | {"SLURM_JOB_ID": "1235"}, STEP | {"SLURM_STEP_ID": "1"}]
    ports = {found.port for env in others if (found := find_nodes(None, None, env=env))}
    assert len(ports | {nodes.port}) == 3
    assert all(20_000 <= port < 32_000 for port in ports)


@pytest.mark.parametrize("step", ["4294967291", "4294967290", ""])
def test_outside_of_srun_there_is_no_step(step: str) -> None:
    """A batch script and an interactive shell are no task of a step."""
    assert find_step(STEP | {"SLURM_STEP_ID": step}) is None
    assert find_nodes(None, None, env=STEP | {"SLURM_STEP_ID": step}) is None


def test_srun_alone_makes_a_world() -> None:
    """`srun python recipe.py`: the tasks are the ranks, as Slurm counts them."""
    env = STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    world = find_world(env)
    assert (world.rank, world.world_size, world.local_rank, world.nodes) == (5, 6, 1, 3)
    assert world.address is not None
    assert world.address[0] == "gpu008"
    with pytest.raises(WorldError, match="2, 1 tasks on the nodes gpu008, gpu009"):
        find_world(
            env
            | {"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_STEP_NODELIST": "gpu[008-009]"}
            | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}
        )


@pytest.mark.parametrize(
    ("count", "rendezvous", "env", "message"),
    [
        (2, None, {}, "--rendezvous HOST"),
        (None, "node1", {}, "--nodes M"),
        (2, "node1:port", {}, "expected HOST or HOST:PORT"),
        (2, "node1:99999", {}, "expected HOST or HOST:PORT"),
        (2, None, STEP, "--nodes 2 was asked for, and the job step has 3"),
        (None, None, STEP | {"SLURM_STEP_TASKS_PER_NODE": "4(x3)"}, "--ntasks-per-node=1"),
        (None, None, {"SLURM_STEP_ID": "0"}, "SLURM_JOB_ID is not"),
        (None, None, STEP | {"SLURM_PROCID": "7"}, "task 7 on node 2"),
        (None, None, STEP | {"SLURM_STEP_TASKS_PER_NODE": "x"}, "cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused(
    count: int | None, rendezvous: str | None, env: dict[str, str], message: str
) -> None:
    """With what was asked, what was found and what to do."""
    with pytest.raises(UsageError, match=re.escape(message)):
        find_nodes(count, rendezvous, env=env)


def start(
    run: Commands, port: int, *arguments: str | Path, ranks: int = 1
) -> subprocess.Popen[str]:
    """Start the launcher of one of two machines, by turns."""
    return run.start(
        *("launcher", "run", *arguments, "-n", str(ranks), "--nodes", "2"),
        *("--rendezvous", f"localhost:{port}", "--out", "out", "device=cpu"),
    )


def both(run: Commands, port: int, *arguments: str | Path, ranks: int = 1) -> list[Finished]:
    """Run the launchers of two machines to their end."""
    processes = [start(run, port, *arguments, ranks=ranks) for _ in range(2)]
    return [
        Finished(process.returncode, *said)
        for process in processes
        if (said := process.communicate(timeout=120))
    ]


def test_two_machines_take_the_steps_of_one_process(run: Commands, free_port: int) -> None:
    """Samples, learning rates and counts exactly; losses and weights to rounding."""
    settings = ("epochs=2", "record_samples=true")
    done = both(run, free_port, WORLDS_PY, *settings, ranks=2)
    assert [each.exit_code for each in done] == [0, 0], done
    (said,) = (each.stdout for each in done if each.stdout)
    assert "4 = 2 nodes x 2 CPU ranks" in said
    assert "run folder: out" in said
    alone = run("launcher", "run", WORLDS_PY, *settings, "-n", "1", "--out", "alone")
    assert alone.exit_code == 0, alone.stderr
    wanted, found = (read_trace(RunDir(run.folder / name)) for name in ("alone", "out"))
    difference = compare(wanted, found, tolerance=1e-5)
    assert difference.agrees, difference
    logs = sorted(path.name for path in (run.folder / "out/logs").iterdir())
    assert logs == [f"rank{rank}.log" for rank in range(4)]


def test_one_machine_speaks_of_a_failure(run: Commands, free_port: int) -> None:
    """The one that it happened on; the other ends within seconds and names it."""
    done = both(run, free_port, FAILING, "how=raise", "rank=1")
    assert [each.exit_code for each in done] == [1, 1]
    told, quiet = sorted((each.stderr for each in done), key=len, reverse=True)
    assert "the run failed on rank 1" in told
    assert "ValueError: the loss of rank one" in told
    assert quiet.startswith("launcher: the run ended on this node because ")
    assert len(quiet.splitlines()) == 1


def test_a_machine_that_goes_ends_the_run(run: Commands, free_port: int) -> None:
    """Whatever ended it: no rank of another is left waiting."""
    processes = [start(run, free_port, WORLDS_PY, "epochs=400") for _ in range(2)]
    run_dir = RunDir(run.folder / "out")
    while not run_dir.metrics.exists() or len(read_lines(run_dir.metrics)) < 2:
        assert all(process.poll() is None for process in processes)
    processes[1].kill()
    processes[1].communicate()
    _, stderr = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 1
    assert re.search("has disappeared|the run failed", stderr), stderr


def test_a_stop_on_one_machine_stops_both(run: Commands, free_port: int) -> None:
    """At the same step, with a checkpoint; and it goes on on one machine."""
    processes = [start(run, free_port, WORLDS_PY, "epochs=400") for _ in range(2)]
    run_dir = RunDir(run.folder / "out")
    while not run_dir.metrics.exists() or len(read_lines(run_dir.metrics)) < 2:
        assert all(process.poll() is None for process in processes)
    processes[0].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [75, 75], said
    (checkpoint, *_) = list_checkpoints(run_dir)
    done = run("launcher", "resume", "out", "-n", "1", f"steps={checkpoint.step + 5}")
    assert done.exit_code == 0, done.stderr
    assert json.loads(run_dir.result.read_text())["steps"] == checkpoint.step + 5


def test_a_machine_that_does_not_come_is_missed(run: Commands, free_port: int) -> None:
    """After the time to join, and nothing is left half-written."""
    done = run(
        *("launcher", "run", WORLDS_PY, "-n", "1", "--nodes", "2", "--join-timeout", "1"),
        *("--rendezvous", f"localhost:{free_port}", "--out", "out"),
    )
    assert done.exit_code == 2
    assert "after 1 s nothing has been heard of 1 of 2 nodes" in done.stderr
    assert not (run.folder / "out").exists()


def test_machines_that_run_something_else_are_refused(run: Commands, free_port: int) -> None:
    """Before anything is written."""
    processes = [start(run, free_port, WORLDS_PY, ranks=ranks) for ranks in (1, 2)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert all("The nodes of a run have the same ranks" in each for each in said)
    assert not (run.folder / "out").exists()


def test_run_goes_on_where_it_was_begun(run: Commands) -> None:
    """`--continue` begins a run, and goes on with one that has begun."""
    command = ("launcher", "run", WORLDS_PY, "-n", "1", "--out", "out", "--continue")
    assert run(*command, "steps=3").exit_code == 0
    done = run(*command, "steps=6")
    assert done.exit_code == 0, done.stderr
    assert "resumed from step-00000003" in done.stdout
    steps = [line["step"] for line in read_lines(run.folder / "out/metrics.jsonl")]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
    refused = run("launcher", "run", WORLDS_PY, "--continue")
    assert refused.exit_code == 2
    assert "give that folder as well" in refused.stderr
