"""Which process this is among all processes of the run, as whoever started it says.

Every launcher tells a process its rank through the environment; one table names the variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.environment.slurm_step import SlurmStep, find_step
from launcher.errors import WorldError

_VARIABLES = {
    "rank": ("RANK",),
    "world_size": ("WORLD_SIZE",),
    "local_rank": ("LOCAL_RANK",),
    "local_world_size": ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
}


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place: `rank` of `world_size`, `local_rank` of `local_world_size`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    store: Path | None = None
    """The file in which ranks of one machine find each other; None is at an address."""

    address: tuple[str, int] | None = None
    """Host and port where they find each other; None is at MASTER_ADDR and MASTER_PORT."""

    @property
    def nodes(self) -> int:
        """Nodes in the run, each with the same number of ranks."""
        return self.world_size // self.local_world_size


def find_world(env: Mapping[str, str] | None = None) -> World:
    """Read the world from the environment of `launcher run`, torchrun, accelerate or deepspeed.

    Or of srun, where none of these has started the process. What was started by nobody is alone.

    Raises:
        WorldError: The variables contradict each other, or a launcher started fewer processes
            than it was asked for.
    """
    env = os.environ if env is None else env
    if not any(env.get(name) for name in _VARIABLES["world_size"]):
        _refuse_a_lonely_copy(env)
        step = find_step(env)
        return World() if step is None else _of_step(step)
    found: dict[str, int] = {}
    for field, names in _VARIABLES.items():
        value = next((env[name] for name in names if env.get(name)), None)
        if value is None:
            continue
        if not value.isdigit():
            raise WorldError(f"{names[0]}={value!r} in the environment: expected a whole number.")
        found[field] = int(value)
    world_size = found["world_size"]
    if world_size > 1 and ("rank" not in found or "local_rank" not in found):
        raise WorldError(
            f"WORLD_SIZE={world_size} is set in the environment, but RANK or LOCAL_RANK is not. "
            "Start the ranks with `launcher run`, torchrun or accelerate launch, "
            "or unset WORLD_SIZE to run one process."
        )
    world = World(
        rank=found.get("rank", 0),
        world_size=world_size,
        local_rank=found.get("local_rank", 0),
        local_world_size=found.get("local_world_size", world_size),
    )
    if (
        not 0 <= world.rank < world_size
        or not 0 <= world.local_rank < world.local_world_size
        or world_size % world.local_world_size
    ):
        raise WorldError(
            f"The environment says rank {world.rank} of {world_size}, local rank "
            f"{world.local_rank} of {world.local_world_size}: these contradict each other. Every "
            "node must start the same number of ranks; unset variables left from another run."
        )
    return world


def _of_step(step: SlurmStep) -> World:
    if len(set(step.tasks_per_node)) > 1:
        raise WorldError(
            f"srun has started {', '.join(map(str, step.tasks_per_node))} tasks on the nodes "
            f"{', '.join(step.hosts)}: every node must start the same number of ranks. Give "
            "--ntasks-per-node."
        )
    return World(
        rank=step.task,
        world_size=step.num_tasks,
        local_rank=step.local_task,
        local_world_size=step.tasks_per_node[0],
        address=(step.hosts[0], step.port),
    )


def _refuse_a_lonely_copy(env: Mapping[str, str]) -> None:
    """Refuse what `accelerate launch --cpu --num_processes 2` starts: one process, silently."""
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_PORT" in env:
        raise WorldError(
            "accelerate launch was asked for several processes and started one: with --cpu it does "
            "not start more. Use `accelerate launch --multi_gpu --num_processes N ...` (on CPUs "
            "too) or `launcher run RECIPE -n N`. If one process is what you want, "
            "unset MASTER_ADDR and MASTER_PORT."
        )
