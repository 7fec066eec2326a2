"""The default process group of torch.distributed, over the right network interface."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import (
    DebugLevel,
    FileStore,
    Store,
    get_debug_level,
    set_debug_level,
)

from launcher.engine.ranks.external_store import TIMEOUT, open_store
from launcher.environment.network import (
    INTERFACE_VARIABLES,
    check_interfaces,
    interface_to,
    interface_variables,
)
from launcher.environment.world import World
from launcher.recipe.hang_limits import hang_limits
from launcher.recipe.recipe import Recipe

_MARGIN = timedelta(minutes=5)
"""How much longer a collective call may take than the watchdog waits at most."""

_TIMEOUT_WITHOUT_LIMIT = timedelta(days=365)
"""Timeout of collective calls where `hang_timeout` sets no limit."""


def lower_debug_level(world: World) -> None:
    """Use the debug level INFO instead of DETAIL, with which DDP over gloo crashes (torch 2.13)."""
    if get_debug_level() != DebugLevel.DETAIL:
        return
    set_debug_level(DebugLevel.INFO)
    if world.rank == 0:
        print(
            "launcher: the ranks use TORCH_DISTRIBUTED_DEBUG=INFO, because torch crashes with "
            "DETAIL when DDP trains over gloo. INFO also names the parameters without gradients.",
            file=sys.stderr,
            flush=True,
        )


def group_timeout(recipe: Recipe) -> timedelta:
    """Return the timeout of collective calls, which is longer than every limit of `hang_timeout`.

    The watchdog names the rank at fault; torch would only name a call that took too long.
    """
    longest = hang_limits(recipe.hang_timeout).longest()
    if longest is None:
        return _TIMEOUT_WITHOUT_LIMIT
    return min(max(TIMEOUT, timedelta(seconds=longest) + _MARGIN), _TIMEOUT_WITHOUT_LIMIT)


def lengthen_timeouts(timeout: timedelta) -> None:
    """Give every process group of this process a timeout.

    DeepSpeed makes groups of its own with torch's default, which is 10 minutes over NCCL.
    """
    for group in dist.distributed_c10d._world.pg_map:  # noqa: SLF001
        dist.distributed_c10d._set_pg_timeout(timeout, group)  # noqa: SLF001


def join_process_group(world: World, backend: str, timeout: timedelta) -> None:
    """Join the default process group, over the network interface that reaches rank 0.

    The ranks rendezvous in the file `world.store`, or at `world.address`, or at the address in the
    environment. An existing group is kept.

    Args:
        world: The position of this process among the ranks.
        backend: The communication backend, as `torch.distributed.init_process_group` names it.
        timeout: The timeout of collective calls.

    Raises:
        WorldError: Not all ranks reach that address, or GLOO_SOCKET_IFNAME names an interface that
            this machine does not have.
    """
    if world.address is not None:
        os.environ.update(_environment_variables(world, *world.address))
    if world.nodes == 1:  # whatever the variables name for runs on several machines
        os.environ.update(dict.fromkeys(INTERFACE_VARIABLES, "lo"))
    elif (interface := interface_to(os.environ["MASTER_ADDR"])) is not None:
        for variable, value in interface_variables(interface).items():
            os.environ.setdefault(variable, value)
    check_interfaces()
    if dist.is_initialized():
        return
    if world.store is not None:
        store: Store = FileStore(str(world.store), world.world_size)
    else:
        store = open_store(world)
    dist.init_process_group(
        backend,
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=timeout,
    )


def _environment_variables(world: World, host: str, port: int) -> dict[str, str]:
    """Return the variables from which Accelerate and torch read the rank and the address."""
    values = {
        "RANK": world.rank,
        "WORLD_SIZE": world.world_size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_world_size,
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in values.items()}
