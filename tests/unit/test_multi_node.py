"""One run on several nodes: how they meet, and that it trains like one process.

Each node is a launcher of its own on this machine; test_slurm.py has nodes with names of their own.
"""

from __future__ import annotations

import re

import pytest

from launcher.environment.nodes import NodesRequest, find_nodes
from launcher.environment.slurm_step import find_step, read_counts, read_hosts
from launcher.environment.world import find_world
from launcher.errors import UsageError, WorldError

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
def test_a_node_list_of_slurm_is_expanded(text: str, hosts: list[str]) -> None:
    """Names come in the order of the list, and their numbers keep leading zeros."""
    assert list(read_hosts(text)) == hosts


def test_task_counts_of_slurm_are_expanded() -> None:
    """n(xTIMES) stands for a repeated count, and text that is not a count is refused."""
    assert read_counts("2(x3),1") == (2, 2, 2, 1)
    with pytest.raises(ValueError, match="many"):
        read_counts("many")


def test_a_slurm_step_is_found() -> None:
    """A task knows its node, the first host and all names; jobs and steps use different ports."""
    nodes = find_nodes(NodesRequest(), env=STEP)
    assert nodes is not None
    assert (nodes.count, nodes.index, nodes.host) == (3, 2, "gpu008")
    assert nodes.names == ("gpu008", "gpu009", "gpu010")
    others = [STEP | {"SLURM_JOB_ID": "1235"}, STEP | {"SLURM_STEP_ID": "1"}]
    ports = {other.port for env in others if (other := find_nodes(NodesRequest(), env=env))}
    assert len(ports | {nodes.port}) == 3
    assert all(20_000 <= port < 32_000 for port in ports)


@pytest.mark.parametrize("step", ["4294967291", "4294967290", ""])
def test_outside_of_srun_there_is_no_step(step: str) -> None:
    """A batch script or an interactive shell is not a task of a step."""
    assert find_step(STEP | {"SLURM_STEP_ID": step}) is None
    assert find_nodes(NodesRequest(), env=STEP | {"SLURM_STEP_ID": step}) is None


def test_srun_alone_makes_a_world() -> None:
    """The tasks of `srun python recipe.py` are its ranks, which every node has equally many of."""
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


def two_at(rendezvous: str) -> NodesRequest:
    """Return a request for two nodes that meet at an address."""
    return NodesRequest(count=(2, 2), rendezvous=rendezvous)


@pytest.mark.parametrize(
    ("request_", "env", "fragment"),
    [
        (NodesRequest(count=(2, 2)), {}, "--rendezvous HOST"),
        (NodesRequest(rendezvous="node1"), {}, "--rendezvous node1"),
        (two_at("node1:port"), {}, "HOST:PORT"),
        (two_at("node1:99999"), {}, "HOST:PORT"),
        (two_at("n" * 64), {}, "HOST:PORT"),
        (two_at("node1..lab"), {}, "HOST:PORT"),
        (two_at("node\udce9"), {}, "HOST:PORT"),
        (two_at("node1:\u0661"), {}, "HOST:PORT"),
        (NodesRequest(count=(2, 2)), STEP, "--nodes 2"),
        (NodesRequest(), STEP | {"SLURM_STEP_TASKS_PER_NODE": "4(x3)"}, "--ntasks-per-node=1"),
        (NodesRequest(), {"SLURM_STEP_ID": "0"}, "SLURM_JOB_ID"),
        (NodesRequest(), STEP | {"SLURM_PROCID": "7"}, "task 7"),
        (NodesRequest(), STEP | {"SLURM_STEP_TASKS_PER_NODE": "x"}, "SLURM_STEP_TASKS_PER_NODE"),
        (NodesRequest(spares=1), STEP, "Add --max-restarts"),
        (NodesRequest(count=(2, 3)), STEP, "--nodes 2:3"),
        (NodesRequest(spares=1, restarts=1), {}, "--spares 1 is for runs on several nodes"),
        (NodesRequest(node_timeout=8), {}, "--node-timeout 8 is for runs on several nodes"),
        (NodesRequest(spares=3, restarts=1), STEP, "--spares 3 was asked for, and the job step"),
        (NodesRequest(count=(2, 2), spares=2, restarts=1), STEP, "--nodes 2 --spares 2 was asked"),
        (
            NodesRequest(count=(2, 2), spares=1, restarts=1, rendezvous="pod-0"),
            {"JOB_COMPLETION_INDEX": "0"},
            "--max-restarts 1: Kubernetes",
        ),
    ],
)
def test_inconsistent_nodes_are_refused(
    request_: NodesRequest, env: dict[str, str], fragment: str
) -> None:
    """Options and variables that contradict each other are refused by name."""
    with pytest.raises(UsageError, match=re.escape(fragment)):
        find_nodes(request_, env=env)


@pytest.mark.parametrize(
    ("request_", "counts"),
    [
        (NodesRequest(restarts=1), (3, 3, 0)),
        (NodesRequest(restarts=1, spares=1), (2, 2, 1)),
        (NodesRequest(restarts=1, count=(2, 4)), (2, 3, 0)),
        (NodesRequest(restarts=1, count=(1, 2), spares=1), (1, 2, 1)),
    ],
)
def test_nodes_of_a_step_train_or_are_spares(
    request_: NodesRequest, counts: tuple[int, int, int]
) -> None:
    """Of the nodes of a step, all but the spares train, and a range says how few may go on."""
    nodes = find_nodes(request_, env=STEP)
    assert nodes is not None
    assert (nodes.min_count, nodes.count, nodes.spares) == counts
    assert nodes.launchers == 3
    assert nodes.names == ("gpu008", "gpu009", "gpu010")
