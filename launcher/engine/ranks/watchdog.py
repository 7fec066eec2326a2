"""Watching over a rank from a thread of its own: where it is, and whether it still moves.

Each rank says in health/rank<N>.json which step it is at and what it does. Where it has not moved
for too long it leaves the stacks of all its threads in its log, and the first to notice names the
rank that the others wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from launcher.engine.ranks.processes import children
from launcher.errors import EXIT_FAILED
from launcher.runs.failure_record import Failure, record_failure
from launcher.runs.heartbeat import PHASES, Heartbeat, read_heartbeat
from launcher.runs.rundir import RunDir
from launcher.signals import EXIT_BY_SIGNAL, StopRequest

_SECONDS_BETWEEN_LOOKS = 0.5
_RANKS_PER_SECOND = 64
"""At most as many files a second are written by all ranks together."""

_SECONDS_TO_END = 5.0
"""A rank that was told to end and does not move for so long waits for another that is gone."""

_SECONDS_TO_SPEAK = 3.0
_OURS = ("torch", "launcher", "accelerate", "deepspeed")


class Watchdog:
    """Watches one rank.

    Args:
        run_dir: Where health/ is.
        rank: This one.
        world_size: Ranks in all.
        hang_timeout: Seconds without a move that are too many; None waits for ever.
        stop: Notes what asks this rank to stop.
        log: Where stacks go, a file with a descriptor.
    """

    def __init__(
        self,
        run_dir: RunDir,
        rank: int,
        world_size: int,
        *,
        hang_timeout: float | None,
        stop: StopRequest,
        log: TextIO,
    ) -> None:
        self._run_dir, self._rank, self._world_size = run_dir, rank, world_size
        self._hang_timeout, self._stop, self._log = hang_timeout, stop, log
        self._main = threading.main_thread().ident
        self._every = max(1.0, world_size / _RANKS_PER_SECOND)
        self._closed = threading.Event()
        self._place = 0, PHASES[0], time.monotonic()
        self.usage: Callable[[], dict[str, Any]] = dict
        """Returns what the rank uses, once that is known."""

        run_dir.health(rank).parent.mkdir(exist_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def report_phase(self, step: int, phase: str) -> None:
        """Say that this rank has moved: `step` steps are taken, and it does `phase` now."""
        begins = self._place[1] == PHASES[0] != phase
        self._place = step, phase, time.monotonic()
        if begins:
            self._write()  # from here on there is something to lose

    def close(self) -> None:
        """Stop watching, and leave word of where the rank ended."""
        self._closed.set()
        self._thread.join()
        self._write()

    def _watch(self) -> None:
        written = time.monotonic()
        while not self._closed.wait(_SECONDS_BETWEEN_LOOKS):
            now = time.monotonic()
            still = now - self._place[2]
            if self._stop.number == signal.SIGTERM and still > _SECONDS_TO_END:
                os._exit(EXIT_BY_SIGNAL + signal.SIGTERM)
            starting = self._place[1] == PHASES[0]  # as long as the data takes
            if self._hang_timeout is not None and still > self._hang_timeout and not starting:
                self._end()
            if now - written >= self._every:
                written = now
                self._write()

    def _write(self, **more: Any) -> None:
        step, phase, moved = self._place
        now = time.time()
        health = Heartbeat(
            rank=self._rank,
            node=platform.node(),
            pid=os.getpid(),
            step=step,
            phase=phase,
            since=now - (time.monotonic() - moved),
            time=now,
            **self._used(),
            **more,
        )
        with contextlib.suppress(OSError):  # a full disk stops no run
            path = self._run_dir.health(self._rank)
            beside = path.with_suffix(".tmp")
            beside.write_text(json.dumps(asdict(health)), encoding="utf-8")
            beside.replace(path)

    def _used(self) -> dict[str, Any]:
        """Return what the rank uses; nothing where a device cannot say so any more."""
        try:
            return self.usage()
        except Exception:  # noqa: BLE001  # a driver's own errors, which are not to end the watch
            return {}

    def _end(self) -> None:
        """End the run: say where this rank is, then who it is that the others wait for."""
        where, waits = self._where()
        self._write(stalled=True, where=where, waits=waits)
        print(f"No progress for {self._hang_timeout:g} s. All threads:", file=self._log, flush=True)
        faulthandler.dump_traceback(file=self._log, all_threads=True)
        for child in children():
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGUSR2)  # a DataLoader worker: it leaves its stack as well
        time.sleep(_SECONDS_TO_SPEAK)
        found = [read_heartbeat(self._run_dir, rank) for rank in range(self._world_size)]
        failure = _hang_failure(found, self._hang_timeout or 0.0)
        if record_failure(self._run_dir, failure) and failure.node == platform.node():
            os.kill(failure.pid, signal.SIGKILL)  # one that is stopped takes no other signal
        os._exit(EXIT_FAILED)

    def _where(self) -> tuple[str, bool]:
        """Return where the main thread is, and whether it is in a call that waits for ranks.

        Such a call is torch's own; said is then who made it.
        """
        frame = sys._current_frames().get(self._main or 0)  # noqa: SLF001
        if frame is None:
            return "", False
        parts = Path(frame.f_code.co_filename).parts
        waits = any(part in _OURS for part in parts) and "utils" not in parts
        while frame.f_back is not None and "torch" in Path(frame.f_code.co_filename).parts:
            frame = frame.f_back
        path = frame.f_code.co_filename
        return f"{path}, line {frame.f_lineno}, in {frame.f_code.co_name}", waits


def _behind(rank: int, health: Heartbeat | None, others: int) -> str:
    """Return what the rank that is behind does, and that others wait for it."""
    if health is None:
        what = f"rank {rank} has never been heard of"
    elif not health.stalled:
        what = (
            f"rank {rank} ({health.node}) does not answer: it was last heard of "
            f"{time.time() - health.time:.0f} s ago, after {health.step:,} steps, {health.phase}"
        )
    else:
        what = (
            f"rank {rank} ({health.node}) is {health.phase} in step {health.step + 1:,}, "
            f"at {health.where}"
        )
        if health.phase == "reading data":
            what += ". It waits for its data: num_workers=0 shows whether it is the data set"
    if not others:
        return what
    return f"{what}; the other {'one waits' if others == 1 else f'{others} wait'} for it"


def _waiting_apart(found: list[Heartbeat | None]) -> str | None:
    """Return that ranks wait for each other in different calls, where they do."""
    places: dict[str, int] = {}
    for health in found:
        if health is None or not (health.stalled and health.waits):
            return None
        places.setdefault(health.where, health.rank)
    if len(places) < 2:
        return None
    named = (f"rank {rank} at {where}" for where, rank in list(places.items())[:2])
    return (
        f"the ranks wait for each other in different calls, {' and '.join(named)}: a collective "
        "call that not all of them make, or not in the same order"
    )


def _hang_failure(found: list[Heartbeat | None], timeout: float) -> Failure:
    """Return the failure of a run that hangs, which names the rank that is behind."""

    def progress(rank: int) -> tuple[bool, int, int, bool]:
        health = found[rank]
        if health is None:
            return False, 0, 0, False
        silent = not health.stalled
        return not silent, health.step, PHASES.index(health.phase), health.waits

    last = min(range(len(found)), key=progress)
    health = found[last]
    what = _waiting_apart(found) or _behind(last, health, len(found) - 1)
    return Failure(
        rank=last,
        node="" if health is None else health.node,
        pid=0 if health is None else health.pid,
        time=time.time(),
        error="Hang",
        message=(
            f"No rank has made progress for {timeout:g} s (hang_timeout): {what}. "
            "The stacks of all threads are in the logs."
        ),
        exit_code=EXIT_FAILED,
    )
