"""Programs that start `launcher` once for each rank are refused."""

from __future__ import annotations

import pytest

from launcher.environment.nodes import Nodes
from launcher.errors import WorldError
from launcher.launch.only_launcher import check_only_launcher

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
DEEPSPEED = {"CROSS_SIZE": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "LOCAL_RANK": "0"}
ONE_ON_EACH = {"LOCAL_WORLD_SIZE": "1"}
NODES = Nodes(count=2, host="node1", port=29400, index=None)


@pytest.mark.parametrize(
    ("env", "nodes", "name"),
    [
        (TORCHRUN, None, "torchrun"),
        (TORCHRUN, NODES, "torchrun"),
        (TORCHRUN | ONE_ON_EACH, None, "torchrun"),
        (MPIRUN, None, "mpirun"),
        (DEEPSPEED, None, "deepspeed"),
    ],
)
def test_several_launchers_are_refused(env: dict[str, str], nodes: Nodes | None, name: str) -> None:
    """A program that has started several launchers for one run is named."""
    with pytest.raises(WorldError, match=f"{name} has started this command"):
        check_only_launcher(nodes, env)


@pytest.mark.parametrize(
    ("env", "nodes"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, None),
        (TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, None),
        (TORCHRUN | ONE_ON_EACH, NODES),
    ],
)
def test_one_launcher_on_a_machine_is_accepted(env: dict[str, str], nodes: Nodes | None) -> None:
    """A single process, variables left from another run, and connected nodes are accepted."""
    check_only_launcher(nodes, env)
