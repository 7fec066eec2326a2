"""Train on ranks that each have a simulated device, and on CPU ranks.

    python tests/simulated_ranks.py FOLDER STRATEGY...

A program for test_simulated_device.py. It writes what it has measured to FOLDER/ranks.json.
Collective calls take the memory of the device to gloo.
"""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import simulated_device
import torch
import torch.distributed as dist
from simulated_training import make_recipe, summary
from torch.multiprocessing.spawn import start_processes
from torch.utils._pytree import tree_map

from launcher import make_plan, read_machine
from launcher.engine.backends.accelerate import DDPBackend, GroupBackend
from launcher.engine.backends.fsdp import FSDPBackend
from launcher.engine.backends.placement import Placement
from launcher.engine.ranks.output import Output
from launcher.engine.run import train_rank
from launcher.environment.world import World
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe
from launcher.runs.job import ResumeFrom
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest

RANKS = 2
STOP_AFTER = 7
"""Steps after which the run of the device is interrupted; the epoch has five."""

_COLLECTIVES = (
    *("allreduce_", "allreduce_coalesced_", "broadcast_", "allgather_", "_allgather_base_"),
    *("reduce_scatter_", "_reduce_scatter_base_", "barrier"),
)
_FUNCTIONAL = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")

_Library: Any = torch.library.Library
_libraries: list[Any] = []
"""They last as long as the process."""


def install_collectives() -> None:
    """Let collective calls take tensors of the device, after `simulated_device.install`."""
    in_place = _Library("c10d", "IMPL")
    functional = _Library("_c10d_functional", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they replace torch's kernels
        for name in _COLLECTIVES:
            in_place.impl(name, _in_place(name), "PrivateUse1", allow_override=True)
    for name in _FUNCTIONAL:
        functional.impl(name, _complete(name), "PrivateUse1")
    functional.impl("wait_tensor", lambda tensor: tensor, "PrivateUse1")
    _libraries.extend((in_place, functional))


def _in_place(name: str) -> Any:
    operation = getattr(torch.ops.c10d, name).default

    def call(*args: Any) -> Any:
        result = operation(*tree_map(simulated_device.host_memory, args))
        return (args[0], result[1]) if isinstance(result, tuple) else result

    return call


def _complete(name: str) -> Any:
    operation = getattr(torch.ops._c10d_functional, name).default
    wait = torch.ops._c10d_functional.wait_tensor.default

    def call(*args: Any) -> Any:
        result = wait(operation(*tree_map(simulated_device.host_memory, args)))
        return simulated_device.from_host_memory(result)

    return call


def open_backend(recipe: Recipe, plan: Plan, world: World, device: str) -> GroupBackend:
    """Return a backend of CPU ranks, or one whose ranks have a simulated device each."""
    kind = {"ddp": DDPBackend, "fsdp": FSDPBackend}[plan.strategy]
    backend = kind(recipe, plan, world)
    if device == "cpu":
        return backend
    # Accelerate knows the devices that it supports, and takes this one for the CPU's.
    from accelerate.state import PartialState
    from accelerate.utils import ParallelismConfig

    backend.device = simulated_device.DEVICE
    backend._placement = Placement(backend.device)
    PartialState._shared_state["device"] = backend.device
    state = backend._accelerator.state
    state.device = backend.device
    if plan.strategy == "fsdp":
        state.parallelism_config = ParallelismConfig(dp_shard_size=plan.world_size)
        state.device_mesh = state.parallelism_config.get_device_mesh(simulated_device.NAME)
    return backend


def train_all(rank: int, folder: Path, strategies: list[str], device: str) -> None:
    """Train under every strategy, in one process group after the other."""
    warnings.simplefilter("ignore")
    if device != "cpu":
        simulated_device.install()
        install_collectives()
    machine = replace(read_machine(), num_gpus=0, usable_cores=RANKS)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",  # Accelerate asks for an address
        MASTER_PORT="1",
        RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(RANKS),
    )
    for strategy in strategies:
        world = World(
            rank=rank,
            world_size=RANKS,
            local_rank=rank,
            local_world_size=RANKS,
            store=folder / f"store-{strategy}-{device}",
        )
        recipe = make_recipe(micro_batch_size=4, count=None, strategy=strategy, device="cpu")
        plan = make_plan(recipe, machine, nproc_per_node=RANKS)
        backend = open_backend(recipe, plan, world, device)
        run_dir = RunDir(folder / f"{strategy}-{device}")
        if rank == 0:
            run_dir.path.mkdir()
        dist.barrier()
        for start, last_step in ((None, STOP_AFTER), (ResumeFrom(), None)):
            output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
            train_rank(
                *(recipe, plan, backend, run_dir, output),
                stop=StopRequest(),
                start=start,
                last_step=last_step,
            )
        dist.barrier()
        backend.close()
    os._exit(0)  # gloo's threads


def main() -> None:
    """Train on both kinds of ranks, and write what was measured."""
    folder, strategies = Path(sys.argv[1]), sys.argv[2:]
    start: Any = start_processes
    for device in ("cpu", "device"):
        start(train_all, (folder, strategies, device), nprocs=RANKS, start_method="fork")
    measured = {
        strategy: {device: summary(folder / f"{strategy}-{device}") for device in ("cpu", "device")}
        for strategy in strategies
    }
    (folder / "ranks.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
