"""Ranks of a node that do something one after the other, or wait for all others, without a limit.

A download may take an hour. No collective call can wait for it, because those have a timeout; here
ranks look into the store at which they have met, in short turns, so that signals are handled.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from torch._C._distributed_c10d import PrefixStore, Store

from launcher.environment.world import World
from launcher.errors import LostRankError

T = TypeVar("T")

_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.005, 0.5
"""Between looks; a wait begins with the shortest and doubles it."""

_SECONDS_BEFORE_A_WORD = 30.0
_FAILED, _DONE = "failed", "done"

_numbers = itertools.count()
"""Of the turns that this process has taken part in; the same on every rank of a group."""


class Turns:
    """Turns of the ranks of one group; all of them take part in each, in the same order.

    Args:
        store: At which the group has met.
        world: This process's place in it.
    """

    def __init__(self, store: Store, world: World) -> None:
        self._store = PrefixStore("launcher/turns", store)
        self._world = world
        self._node = world.rank // world.local_world_size

    def first(self, what: str, action: Callable[[], T]) -> T:
        """Call `action` on the first rank of each node, then on the node's others.

        Args:
            what: What it does, for those who wait: "read the data".
            action: What to do.

        Raises:
            LostRankError: It has failed on the first rank, which says why.
        """
        key = self._key(self._node)
        if self._world.local_rank == 0:
            return self._lead(key, action, lambda _: _DONE)
        self._follow(key, what)
        return action()

    def once(self, what: str, action: Callable[[], int]) -> int:
        """Return what `action` returns on the first rank of this node, where alone it is called.

        Raises:
            LostRankError: It has failed there.
        """
        key = self._key(self._node)
        if self._world.local_rank == 0:
            return self._lead(key, action, str)
        return int(self._follow(key, what))

    def all_there(self, what: str) -> None:
        """Wait until every rank of the group has come here, having done `what`."""
        key = self._key("all")
        if self._store.add(key, 1) == self._world.world_size:
            self._store.set(f"{key}/done", _DONE)
            return
        self._wait(lambda: bool(self._store.check([f"{key}/done"])), f"all ranks to have {what}")

    def _key(self, where: object) -> str:
        return f"{next(_numbers)}/{where}"

    def _lead(self, key: str, action: Callable[[], T], said: Callable[[T], str]) -> T:
        word = _FAILED
        try:
            done = action()
            word = said(done)
        finally:
            self._store.set(key, word)
        return done

    def _follow(self, key: str, what: str) -> str:
        first = self._world.rank - self._world.local_rank
        self._wait(lambda: bool(self._store.check([key])), f"rank {first} to have {what}")
        word = self._store.get(key).decode()
        if word == _FAILED:
            raise LostRankError(f"rank {first} of this node has failed before it had {what}")
        return word

    def _wait(self, is_so: Callable[[], bool], what: str) -> None:
        seconds, since, is_said = _SHORTEST_SECONDS, time.monotonic(), False
        while not is_so():
            if not is_said and time.monotonic() - since > _SECONDS_BEFORE_A_WORD:
                is_said = True
                print(f"launcher: waiting for {what}", file=sys.stderr, flush=True)
            time.sleep(seconds)
            seconds = min(2 * seconds, _LONGEST_SECONDS)
