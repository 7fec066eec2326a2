"""One rank of a large world in this process: its collective calls return at once.

torch's fake process group makes no communication, so sums and gathered values are wrong, and only
what a rank computes from its number and from the number of ranks can be tested.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from launcher import Recipe, make_plan, read_machine
from launcher.engine.backends.accelerate import (
    DDPBackend,
    GroupBackend,
    reset_accelerate_state,
)
from launcher.engine.backends.fsdp import FSDPBackend
from launcher.environment.world import World
from launcher.planning.plan import Plan

RANKS_PER_NODE = 8
BACKENDS = {"ddp": DDPBackend, "fsdp": FSDPBackend}


def large_plan(recipe: Recipe, world_size: int) -> Plan:
    """Return the plan of a recipe for nodes of eight CPU ranks each."""
    machine = replace(read_machine(), num_gpus=0, usable_cores=RANKS_PER_NODE)
    nodes = world_size // RANKS_PER_NODE
    return make_plan(recipe, machine, nodes=nodes, nproc_per_node=RANKS_PER_NODE)


@contextmanager
def fake_rank(recipe: Recipe, world_size: int, rank: int) -> Iterator[GroupBackend]:
    """Yield the backend of one rank of a world whose other ranks do not exist."""
    world = World(
        rank=rank,
        world_size=world_size,
        local_rank=rank % RANKS_PER_NODE,
        local_world_size=RANKS_PER_NODE,
    )
    variables = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": RANKS_PER_NODE,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
        "OMP_NUM_THREADS": 1,  # which the launcher sets, and Accelerate asks for
    }
    clear: Any = _clear_sharding_prop_cache
    clear()  # it holds meshes, which know the rank of this process
    with pytest.MonkeyPatch.context() as patch:
        before = dict(os.environ)
        for name, value in variables.items():
            patch.setenv(name, str(value))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            plan = large_plan(recipe, world_size)
            yield BACKENDS[plan.strategy](recipe, plan, world)
        finally:
            dist.destroy_process_group()
            reset_accelerate_state()
            os.environ.clear()
            os.environ.update(before)
