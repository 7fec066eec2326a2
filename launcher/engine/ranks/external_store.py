"""The store at which ranks meet that torchrun, accelerate launch or srun started.

torch waits for the ranks in C++, where signals are not handled and nothing is printed. This module
polls in Python instead.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from launcher.engine.ranks.rendezvous import accepts_connections
from launcher.environment.world import World
from launcher.errors import WorldError
from launcher.recipe.text_values import digits

TIMEOUT = timedelta(minutes=30)
"""Timeout of the store, and of collective calls unless a limit of `hang_timeout` is longer."""

PATIENCE_SECONDS = 300.0
"""Longest wait for the other ranks; the same as --join-timeout of `launcher run`."""

_POLL_SECONDS = 0.05
_SECONDS_BEFORE_MESSAGE = 5.0
"""How long a rank waits before it prints for whom."""


@functools.cache
def open_store(world: World) -> Store:
    """Connect to the store of a world and return it when all ranks have arrived.

    The address is that of `world`, or MASTER_ADDR and MASTER_PORT. An agent that restarts its ranks
    keeps its store, so every attempt uses keys of its own.

    Raises:
        WorldError: The ranks do not arrive within 300 s, the address is missing, or its port is
            taken.
    """
    host, port = world.address or _read_address()
    deadline = time.monotonic() + PATIENCE_SECONDS
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        if world.rank == 0 and not by_agent:
            store = TCPStore(
                host,
                port,
                world.world_size,
                is_master=True,
                timeout=TIMEOUT,
                wait_for_workers=False,
                multi_tenant=True,
            )
        else:
            owner = "the launcher of rank 0" if by_agent else "rank 0"
            _wait_until(
                lambda: accepts_connections(host, port), lambda: owner, host, port, deadline
            )
            store = TCPStore(host, port, world.world_size, is_master=False, timeout=TIMEOUT)
        attempt_store = PrefixStore(f"launcher/attempt{attempt}", store)
        _wait_for_all(attempt_store, world, host, port, deadline)
    except RuntimeError as error:  # raised by the store
        raise WorldError(
            f"Rank {world.rank} cannot meet the other ranks at {host}:{port} (MASTER_ADDR and "
            f"MASTER_PORT): {str(error).splitlines()[0]}. Another program may use that port, or "
            "rank 0 has ended."
        ) from None
    return attempt_store


def _wait_for_all(store: Store, world: World, host: str, port: int, deadline: float) -> None:
    """Wait until every rank has arrived.

    Raises:
        WorldError: The deadline passes.
    """
    arrivals = PrefixStore("launcher/arrivals", store)
    arrivals.add("ranks", 1)

    def num_missing() -> int:
        return world.world_size - int(arrivals.add("ranks", 0))

    def missing_ranks() -> str:
        count = num_missing()
        return f"{count} other rank{'' if count == 1 else 's'}"

    _wait_until(lambda: num_missing() <= 0, missing_ranks, host, port, deadline)


def _read_address() -> tuple[str, int]:
    """Return MASTER_ADDR and MASTER_PORT.

    Raises:
        WorldError: One of them is missing, or the port is not a number.
    """
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    number = digits(port)
    if not host or number is None or number >= 1 << 16:
        raise WorldError(
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} is set in the environment, so the ranks "
            f"have to meet at MASTER_ADDR and MASTER_PORT: expected a host and a port, found "
            f"MASTER_ADDR={host!r}, MASTER_PORT={port!r}. Start the ranks with `launcher run`, "
            "torchrun or accelerate launch, or unset WORLD_SIZE to run one process."
        )
    return host, number


def _wait_until(
    is_done: Callable[[], bool], missing: Callable[[], str], host: str, port: int, deadline: float
) -> None:
    """Poll until `is_done` returns True; after 5 s print once for whom this rank waits.

    Raises:
        WorldError: The deadline passes.
    """
    message_at = time.monotonic() + _SECONDS_BEFORE_MESSAGE
    while not is_done():
        now = time.monotonic()
        if now > deadline:
            raise WorldError(
                f"After {PATIENCE_SECONDS:.0f} s this rank still waits for {missing()} at "
                f"{host}:{port} (MASTER_ADDR and MASTER_PORT). Start every rank, or unset RANK and "
                "WORLD_SIZE to run one process; `launcher run` starts the ranks itself."
            )
        if now > message_at:
            message_at = deadline + _SECONDS_BEFORE_MESSAGE
            print(
                f"launcher: waiting for {missing()} at {host}:{port}", file=sys.stderr, flush=True
            )
        time.sleep(_POLL_SECONDS)
