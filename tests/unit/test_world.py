"""The rank and world size of this process, read from the environment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.environment.machine import read_machine
from launcher.environment.world import World, find_world, machine_of
from launcher.errors import WorldError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_torchrun() -> None:
    """Torchrun's variables give the rank, the world size and the number of nodes."""
    world = find_world(TORCHRUN)
    assert world == World(rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert world.nodes == 2


def test_alone() -> None:
    """Without variables the process is a world of one rank."""
    assert find_world({}) == World()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK or LOCAL_RANK is not"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "local rank 1 of 3"),
        (TORCHRUN | {"RANK": "x"}, "RANK='x'"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "--multi_gpu"),
    ],
)
def test_contradictions_are_refused(env: dict[str, str], message: str) -> None:
    """Variables that contradict each other are refused with their values."""
    with pytest.raises(WorldError) as caught:
        find_world(env)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("visible", "address", "planned"),
    [(1, ("node1", 20_000), 4), (4, ("node1", 20_000), 4), (2, ("node1", 20_000), 2), (1, None, 1)],
)
def test_a_task_that_sees_one_gpu_has_its_own(
    visible: int, address: tuple[str, int] | None, planned: int
) -> None:
    """One visible GPU counts for each of four tasks of a Slurm step, and for nobody else."""
    machine = replace(read_machine(), num_gpus=visible)
    world = World(rank=1, world_size=4, local_rank=1, local_world_size=4, address=address)
    assert machine_of(machine, world).num_gpus == planned
