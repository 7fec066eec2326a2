"""Ranks of a node that take turns, or wait for all ranks, without a timeout.

A download may take an hour, which no collective call can wait for, because those have a timeout.
The ranks poll the store at which they met instead, so that signals are handled while they wait.
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
"""Polling intervals; a wait begins with the shortest and doubles it up to the longest."""

_SECONDS_BEFORE_MESSAGE = 30.0
"""How long a rank waits before it prints what for."""

_FAILED, _DONE = "failed", "done"

_turn_numbers = itertools.count()
"""Numbers of the turns that this process takes part in; the same on every rank of a group."""


class Turns:
    """Turns among the ranks of a process group.

    Every rank takes part in every turn, and in the same order.

    Args:
        store: The store at which the group met.
        world: This process's rank in the group.
    """

    def __init__(self, store: Store, world: World) -> None:
        self._store = PrefixStore("launcher/turns", store)
        self._world = world
        self._node = world.rank // world.local_world_size

    def first(self, what: str, action: Callable[[], T]) -> T:
        """Call `action` on the first rank of each node, then on the other ranks of the node.

        Args:
            what: The action as a past participle, for messages: "read the data".
            action: The function to call; every rank returns its own result.

        Raises:
            LostRankError: The action failed on the first rank, which reports the error.
        """
        key = self._key(self._node)
        if self._world.local_rank == 0:
            return self._lead(key, action, lambda _: _DONE)
        self._follow(key, what)
        return action()

    def one_by_one(self, what: str, action: Callable[[], T]) -> T:
        """Call `action` on one rank of this node after the other, in the order of the ranks.

        Args:
            what: The action as a past participle, for messages: "read the data".
            action: The function to call; every rank returns its own result.

        Raises:
            LostRankError: The action failed on an earlier rank, which reports the error.
        """
        key, local = self._key(self._node), self._world.local_rank
        if local > 0:
            self._follow(f"{key}/{local - 1}", what, rank=self._world.rank - 1)
        return self._lead(f"{key}/{local}", action, lambda _: _DONE)

    def once(self, what: str, action: Callable[[], int]) -> int:
        """Call `action` on the first rank of this node only; return its result on all its ranks.

        Args:
            what: The action as a past participle, for messages: "read the data".
            action: The function to call.

        Raises:
            LostRankError: The action failed on the first rank, which reports the error.
        """
        key = self._key(self._node)
        if self._world.local_rank == 0:
            return self._lead(key, action, str)
        return int(self._follow(key, what))

    def wait_for_all(self, what: str) -> None:
        """Wait until every rank of the group has called this method.

        Args:
            what: What the ranks did before, as a past participle, for messages: "read the data".
        """
        key = self._key("all")
        if self._store.add(key, 1) == self._world.world_size:
            self._store.set(f"{key}/done", _DONE)
            return
        self._wait(lambda: bool(self._store.check([f"{key}/done"])), f"all ranks to have {what}")

    def _key(self, scope: object) -> str:
        return f"{next(_turn_numbers)}/{scope}"

    def _lead(self, key: str, action: Callable[[], T], to_text: Callable[[T], str]) -> T:
        """Call `action`, and set `key` to its result as text, or to `failed` if it raises."""
        text = _FAILED
        try:
            result = action()
            text = to_text(result)
        finally:
            self._store.set(key, text)
        return result

    def _follow(self, key: str, what: str, rank: int | None = None) -> str:
        """Wait for the text that another rank of this node sets `key` to, and return it.

        Args:
            key: The key.
            what: What the other rank does, as a past participle.
            rank: The other rank; None is the first rank of this node.

        Raises:
            LostRankError: The action failed on that rank.
        """
        first = self._world.rank - self._world.local_rank if rank is None else rank
        self._wait(lambda: bool(self._store.check([key])), f"rank {first} to have {what}")
        text = self._store.get(key).decode()
        if text == _FAILED:
            raise LostRankError(f"rank {first} of this node failed before it had {what}")
        return text

    def _wait(self, is_done: Callable[[], bool], what: str) -> None:
        """Poll until `is_done` returns True; print once what this rank waits for."""
        seconds, start, has_printed = _SHORTEST_SECONDS, time.monotonic(), False
        while not is_done():
            if not has_printed and time.monotonic() - start > _SECONDS_BEFORE_MESSAGE:
                has_printed = True
                print(f"launcher: waiting for {what}", file=sys.stderr, flush=True)
            time.sleep(seconds)
            seconds = min(2 * seconds, _LONGEST_SECONDS)
