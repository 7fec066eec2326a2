"""Where ranks that we have not started find each other: a store at the first rank's address.

torch waits for them in C++, where no signal is handled and no word is said. Here the wait is in
Python, in short turns.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from launcher.engine.ranks.rendezvous import answers
from launcher.environment.world import World
from launcher.errors import WorldError

TIMEOUT = timedelta(minutes=30)
"""Of a collective call; a rank that is stuck is named before, see `hang_timeout`."""

PATIENCE_SECONDS = 300.0
"""For the other ranks to come, as --join-timeout of `launcher run` has it for machines."""

_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_BEFORE_A_WORD = 5.0


@functools.cache
def open_store(world: World) -> Store:
    """Return the store at the address of `world`, or in the environment, when all ranks are there.

    An agent that starts its ranks again keeps its store, so each attempt has keys of its own.

    Raises:
        WorldError: They do not come in time, the address is missing, or its port is taken.
    """
    host, port = world.address or _address()
    until = time.monotonic() + PATIENCE_SECONDS
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
            first = "the launcher of rank 0" if by_agent else "rank 0"
            _wait_until(lambda: answers(host, port), lambda: first, host, port, until)
            store = TCPStore(host, port, world.world_size, is_master=False, timeout=TIMEOUT)
        own = PrefixStore(f"launcher/attempt{attempt}", store)
        _wait_for_all(own, world, host, port, until)
    except RuntimeError as error:  # of the store
        raise WorldError(
            f"The ranks of this run meet at {host}:{port} (MASTER_ADDR and MASTER_PORT), and rank "
            f"{world.rank} cannot: {str(error).splitlines()[0]}. Another program may use that "
            "port, or rank 0 has ended."
        ) from None
    return own


def _wait_for_all(store: Store, world: World, host: str, port: int, until: float) -> None:
    arrivals = PrefixStore("launcher/arrivals", store)
    arrivals.add("ranks", 1)

    def missing() -> int:
        return world.world_size - int(arrivals.add("ranks", 0))

    def others() -> str:
        count = missing()
        return f"{count} other rank{'' if count == 1 else 's'}"

    _wait_until(lambda: missing() <= 0, others, host, port, until)


def _address() -> tuple[str, int]:
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not port.isdigit():
        raise WorldError(
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} is set in the environment, and the ranks "
            f"meet at MASTER_ADDR={host!r}, MASTER_PORT={port!r}: expected a host and a port. "
            "Start the ranks with `launcher run`, torchrun or accelerate launch, or unset "
            "WORLD_SIZE to run one process."
        )
    return host, int(port)


def _wait_until(
    is_so: Callable[[], bool], whom: Callable[[], str], host: str, port: int, until: float
) -> None:
    """Wait; say for whom after some seconds.

    Raises:
        WorldError: It takes too long.
    """
    word = time.monotonic() + _SECONDS_BEFORE_A_WORD
    while not is_so():
        now = time.monotonic()
        if now > until:
            raise WorldError(
                f"After {PATIENCE_SECONDS:.0f} s this rank still waits for {whom()} at "
                f"{host}:{port} (MASTER_ADDR and MASTER_PORT). Start every rank, or unset RANK and "
                "WORLD_SIZE to run one process; `launcher run` starts the ranks itself."
            )
        if now > word:
            word = until + _SECONDS_BEFORE_A_WORD
            print(f"launcher: waiting for {whom()} at {host}:{port}", file=sys.stderr, flush=True)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
