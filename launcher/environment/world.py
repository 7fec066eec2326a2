"""`World`: the rank of this process, and how many ranks there are.

Every launcher passes this through environment variables, which one table in this module lists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.environment.machine import Machine
from launcher.environment.slurm_step import SlurmStep, find_step
from launcher.errors import WorldError
from launcher.recipe.text_values import digits
from launcher.recipe.validation import brief

_VARIABLES = {
    "rank": ("RANK",),
    "world_size": ("WORLD_SIZE",),
    "local_rank": ("LOCAL_RANK",),
    "local_world_size": ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
}
"""The environment variables that hold each field of a `World`; the first that is set counts."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of a process in a run: a rank among all ranks, and among those of its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    store: Path | None = None
    """The file through which the ranks of one machine rendezvous; None rendezvous by address."""

    address: tuple[str, int] | None = None
    """Host and port of the rendezvous; None reads MASTER_ADDR and MASTER_PORT."""

    @property
    def nodes(self) -> int:
        """Return the number of nodes, each of which has the same number of ranks."""
        return self.world_size // self.local_world_size


def find_world(env: Mapping[str, str] | None = None) -> World:
    """Return this process's place in the run, from the environment.

    `launcher run`, torchrun, accelerate and deepspeed set the variables. If none of them started
    this process, the place follows from Slurm's job step, if any; otherwise it is a world of one.

    Args:
        env: The environment; None reads this process's.

    Raises:
        WorldError: The variables contradict each other, or a launcher started fewer processes
            than it was asked for.
    """
    env = os.environ if env is None else env
    if not any(env.get(name) for name in _VARIABLES["world_size"]):
        _refuse_single_process_of_accelerate(env)
        step = find_step(env)
        return World() if step is None else _of_step(step)
    values: dict[str, int] = {}
    for field, names in _VARIABLES.items():
        text = next((env[name] for name in names if env.get(name)), None)
        if text is None:
            continue
        number = digits(text)
        if number is None:
            raise WorldError(
                f"{names[0]}={brief(repr(text))} in the environment: expected a whole number."
            )
        values[field] = number
    world_size = values["world_size"]
    if world_size > 1 and ("rank" not in values or "local_rank" not in values):
        raise WorldError(
            f"WORLD_SIZE={world_size} is set in the environment, but RANK or LOCAL_RANK is not. "
            "Start the ranks with `launcher run`, torchrun or accelerate launch, "
            "or unset WORLD_SIZE to run one process."
        )
    world = World(
        rank=values.get("rank", 0),
        world_size=world_size,
        local_rank=values.get("local_rank", 0),
        local_world_size=values.get("local_world_size", world_size),
    )
    if (
        not 0 <= world.rank < world_size
        or not 0 <= world.local_rank < world.local_world_size
        or world_size % world.local_world_size
    ):
        raise WorldError(
            f"The environment has rank {world.rank} of {world_size} and local rank "
            f"{world.local_rank} of {world.local_world_size}, which contradict each other. Every "
            "node must start the same number of ranks; unset variables that are left from another "
            "run."
        )
    return world


def _of_step(step: SlurmStep) -> World:
    if len(set(step.tasks_per_node)) > 1:
        raise WorldError(
            f"srun started {', '.join(map(str, step.tasks_per_node))} tasks on the nodes "
            f"{', '.join(step.hosts)}, and every node must start the same number of ranks. Use "
            "--ntasks-per-node."
        )
    return World(
        rank=step.task,
        world_size=step.num_tasks,
        local_rank=step.local_task,
        local_world_size=step.tasks_per_node[0],
        address=(step.hosts[0], step.port),
    )


def machine_of(machine: Machine, world: World) -> Machine:
    """Return the machine with the GPUs of all ranks on the node, as this rank can see it.

    Slurm's --gpus-per-task=1 shows each task one GPU, a different one to each. The ranks compare
    their GPUs when they meet.

    Args:
        machine: What this process can see.
        world: Its place among the ranks.
    """
    is_task_of_step = world.address is not None
    if is_task_of_step and machine.num_gpus == 1:
        return replace(machine, num_gpus=world.local_world_size)
    return machine


def _refuse_single_process_of_accelerate(env: Mapping[str, str]) -> None:
    """Refuse the process of `accelerate launch --cpu --num_processes 2`, which starts only one.

    Raises:
        WorldError: Accelerate started this process, and no other.
    """
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_PORT" in env:
        raise WorldError(
            "accelerate launch was asked for several processes and started one, as it does with "
            "--cpu. Use `accelerate launch --multi_gpu --num_processes N ...` (on CPUs too) or "
            "`launcher run RECIPE -n N`. To train with one process, unset MASTER_ADDR and "
            "MASTER_PORT."
        )
