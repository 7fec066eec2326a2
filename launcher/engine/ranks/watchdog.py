"""The watchdog of a rank: a thread that writes its heartbeat and ends a run that hangs.

The heartbeat in health/rank<N>.json holds the step and the phase of the rank. Each phase has a
limit (`hang_timeout`). When the first rank has made no progress for that long, all ranks write
where they are, and the stacks of their threads to their logs. Then a failure is recorded that names
the rank for which the others wait.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from launcher.console.failure import failure_text
from launcher.engine.ranks import debugger
from launcher.engine.ranks.flight_recorder import record_collectives
from launcher.engine.ranks.processes import worker_pids
from launcher.errors import EXIT_FAILED, RunDirError
from launcher.json_file import encode_json
from launcher.planning.derivations import counted
from launcher.recipe.hang_limits import HangLimits, HangPhase
from launcher.regular_file import overwrite
from launcher.runs.collectives import find_missing_call, read_collectives
from launcher.runs.failure_record import Failure, record_failure
from launcher.runs.heartbeat import PHASES, Hang, Heartbeat, find_hang, read_heartbeat
from launcher.runs.prometheus import metrics_file_of
from launcher.runs.rundir import RunDir
from launcher.signals import EXIT_BY_SIGNAL, StopRequest, end_process

_POLL_SECONDS = 0.5
_HEARTBEATS_PER_SECOND = 64
"""Most heartbeat files that all ranks together write in a second."""

_SECONDS_TO_END = 5.0
"""How long a rank may stand still after it got SIGTERM or another rank has recorded a failure;
after that it waits for a rank that is gone."""

_SECONDS_TO_RECORD = 10.0
"""Time for torch to write the collective calls of a hanging rank."""

_SECONDS_TO_REPORT = 3.0
"""Time for all ranks of a hanging run to write where they are, before one of them is named."""

_WAITING_PACKAGES = ("torch", "launcher", "accelerate", "deepspeed")
"""Packages whose calls wait for other ranks; a main thread inside them is not the cause."""


_LIMIT_OF: Mapping[str, HangPhase] = {
    "starting": "start",
    "reading data": "step",
    "computing": "step",
    "evaluating": "evaluation",
    "saving": "save",
    "finishing": "save",
}
"""The limit that holds in each of `PHASES`; that of the start also holds in the first step."""

_ORDER = ("starting", "evaluating", "saving", "reading data", "computing", "finishing")
"""`PHASES` in the order in which a rank passes through them with the same number of steps taken."""

_IN_WORDS = {
    "start": "the start of a run",
    "step": "a step",
    "evaluation": "an evaluation",
    "save": "a save",
}


class Watchdog:
    """Writes the heartbeat of one rank and ends the run if it hangs.

    Args:
        run_dir: The run folder.
        rank: The rank of this process.
        world_size: Number of ranks.
        limits: Seconds without progress after which the run ends, by phase.
        stop: The stop request of this rank.
        log: Stream for stacks, a file with a descriptor.
        errors: Stream that shows a failure which no file can hold.
    """

    def __init__(
        self,
        run_dir: RunDir,
        rank: int,
        world_size: int,
        *,
        limits: HangLimits,
        stop: StopRequest,
        log: TextIO,
        errors: TextIO,
    ) -> None:
        self._run_dir, self._rank, self._world_size = run_dir, rank, world_size
        self._limits, self._stop = limits, stop
        self._log, self._errors = log, errors
        self._main_thread = threading.main_thread().ident
        self._heartbeat_seconds = max(1.0, world_size / _HEARTBEATS_PER_SECOND)
        self._closed = threading.Event()
        self._metrics_file = metrics_file_of(run_dir) if rank == 0 else None
        self._progress = 0, PHASES[0], time.monotonic()
        self._first_step: int | None = None
        """Steps that were taken before this process took its first one; None if not yet known."""

        self._opened_at = self._started_at = time.time()
        """When this rank left the phase `starting`, in seconds since 1970."""

        self._debugged_at = 0.0
        """When the run was last seen in a debugger, by the clock `time.monotonic`."""

        self._debugger_time = self._time_of_debugger()

        self.usage: Callable[[], dict[str, Any]] = dict
        """Returns memory and utilisation as fields of `Heartbeat`; set when the device is known."""

        with contextlib.suppress(OSError):  # a full disk must not stop the run
            run_dir.health(rank).parent.mkdir(exist_ok=True)
        self._write_heartbeat()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def report_phase(self, step: int, phase: str) -> None:
        """Record progress of this rank.

        Args:
            step: Optimizer steps taken.
            phase: What the rank does from now on, one of `PHASES`.
        """
        has_started = self._progress[1] == PHASES[0] != phase
        if has_started and self._first_step is None:
            self._first_step = step
        self._progress = step, phase, time.monotonic()
        if has_started:  # the launcher now lets the ranks save before it ends them
            self._started_at = time.time()
            self._write_heartbeat()

    def close(self) -> None:
        """End the thread and write a last heartbeat."""
        self._closed.set()
        self._thread.join()
        self._write_heartbeat()
        if self._metrics_file is not None:
            self._metrics_file.remove()

    def _watch(self) -> None:
        written_at = time.monotonic()
        while not self._closed.wait(_POLL_SECONDS):
            now = time.monotonic()
            if self._is_debugged():
                self._debugged_at = now
            still_seconds = now - self._progress[2]
            is_starting = self._progress[1] == PHASES[0]  # a download may take any time
            if still_seconds > _SECONDS_TO_END and (
                self._stop.has_received(signal.SIGTERM) or (not is_starting and self._has_failed())
            ):
                end_process(EXIT_BY_SIGNAL + signal.SIGTERM)
            waiting_seconds = min(still_seconds, now - self._debugged_at)
            if (hang := self._find_hang(waiting_seconds)) is not None:
                self._end_run(hang)
            if now - written_at >= self._heartbeat_seconds:
                written_at = now
                self._write_heartbeat()
                self._write_metrics()

    def _write_metrics(self) -> None:
        """Write the numbers of the run for Prometheus, on rank 0 and if that is asked for."""
        if self._metrics_file is not None:
            with contextlib.suppress(RunDirError):  # a missing folder must not stop the run
                self._metrics_file.write()

    def _is_debugged(self) -> bool:
        """Return whether a process of the run is in a debugger, for which the ranks wait.

        Ranks on the node of the process see its lock. The others see that a file in the run folder
        is touched every second, by whatever clock.
        """
        if debugger.is_in_use():
            with contextlib.suppress(OSError):
                self._run_dir.debugger.touch()
            return True
        if time.monotonic() - self._progress[2] < _SECONDS_TO_END:
            return False
        touched_at = self._time_of_debugger()
        has_changed = touched_at != self._debugger_time
        self._debugger_time = touched_at
        return has_changed

    def _time_of_debugger(self) -> float:
        try:
            return self._run_dir.debugger.stat().st_mtime
        except OSError:
            return 0.0

    def _find_hang(self, still_seconds: float) -> Hang | None:
        """Return the limit that this rank has reached, or another one while this one stands still.

        Limits of ranks differ: one may still be saving while another waits for it in a step.

        Args:
            still_seconds: Seconds since this rank made progress, or was in a debugger.
        """
        step, phase, _ = self._progress
        name = _LIMIT_OF[phase]
        if name == "step" and step == self._first_step:
            name = "start"  # workers fill their queues, code is compiled, ranks connect
        limit: float | None = getattr(self._limits, name)
        if limit is not None and still_seconds > limit:
            return Hang(phase=name, seconds=limit)
        if still_seconds > _SECONDS_TO_END:
            return find_hang(self._run_dir, since=self._opened_at)
        return None

    def _has_failed(self) -> bool:
        """Return whether a rank has recorded a failure since this one started.

        A rank inside a collective call does not handle SIGTERM. It notices that a peer has ended
        when their connection closes, which a process that the peer started may hold open.
        """
        try:
            return self._run_dir.failure.stat().st_mtime > self._started_at
        except OSError:
            return False

    def _write_heartbeat(self, **more: Any) -> None:
        step, phase, since = self._progress
        now = time.time()
        heartbeat = Heartbeat(
            rank=self._rank,
            node=platform.node(),
            pid=os.getpid(),
            step=step,
            phase=phase,
            since=now - (time.monotonic() - since),
            time=now,
            **self._measure_usage(),
            **more,
        )
        with contextlib.suppress(OSError):  # a full disk must not stop the run
            path = self._run_dir.health(self._rank)
            temporary = path.with_suffix(".tmp")
            overwrite(temporary, encode_json(asdict(heartbeat)).encode())
            temporary.replace(path)

    def _measure_usage(self) -> dict[str, Any]:
        """Return the memory and utilisation of the rank, or nothing if the device fails."""
        try:
            return self.usage()
        except Exception:  # noqa: BLE001  # a driver's error must not end this thread
            return {}

    def _end_run(self, hang: Hang) -> None:
        """Report where this rank is, record the rank for which the others wait, and exit."""
        where, waits = self._find_main_thread()
        self._write_heartbeat(stalled=True, where=where, waits=waits)
        if find_hang(self._run_dir, since=self._opened_at) is None:
            with contextlib.suppress(OSError):
                overwrite(self._run_dir.hang, encode_json(asdict(hang)).encode())
        # torch asks the driver about the calls, and a driver that hangs would keep this thread, and
        # Python's lock with it. faulthandler ends the process without either.
        faulthandler.dump_traceback_later(_SECONDS_TO_RECORD, exit=True, file=self._log)
        record_collectives(self._run_dir.collectives(self._rank))
        faulthandler.cancel_dump_traceback_later()
        print(f"{_hang_text(hang)}. All threads:", file=self._log, flush=True)
        faulthandler.dump_traceback(file=self._log, all_threads=True)
        for child in worker_pids():
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGUSR2)  # a DataLoader worker writes its stack to the log
        time.sleep(_SECONDS_TO_REPORT)
        heartbeats = [read_heartbeat(self._run_dir, rank) for rank in range(self._world_size)]
        calls = [read_collectives(self._run_dir, rank) for rank in range(self._world_size)]
        failure = _hang_failure(heartbeats, hang, find_missing_call(calls))
        record = record_failure(self._run_dir, failure)
        if record == "unwritten":
            print(failure_text(failure, self._run_dir), file=self._errors, flush=True)
        if record != "later" and failure.node == platform.node():
            os.kill(failure.pid, signal.SIGKILL)  # a stopped process handles no other signal
        end_process(EXIT_FAILED)

    def _find_main_thread(self) -> tuple[str, bool]:
        """Return where the main thread is, and whether it is in a call that waits for ranks.

        For a call inside torch the place is that of the caller.
        """
        frame = sys._current_frames().get(self._main_thread or 0)  # noqa: SLF001
        if frame is None:
            return "", False
        parts = Path(frame.f_code.co_filename).parts
        waits = any(part in _WAITING_PACKAGES for part in parts) and "utils" not in parts
        while frame.f_back is not None and "torch" in Path(frame.f_code.co_filename).parts:
            frame = frame.f_back
        path = frame.f_code.co_filename
        return f"{path}, line {frame.f_lineno}, in {frame.f_code.co_name}", waits


def _hang_text(hang: Hang) -> str:
    return (
        f"No progress for {hang.seconds:g} s, the limit of {_IN_WORDS[hang.phase]} "
        f"(hang_timeout={hang.phase}:{hang.seconds:g})"
    )


def _place(heartbeat: Heartbeat) -> str:
    """Return the phase of a rank and its step: `computing in step 2`, `saving after 20 steps`."""
    if heartbeat.phase == PHASES[0]:
        return heartbeat.phase
    if _LIMIT_OF[heartbeat.phase] == "step":
        return f"{heartbeat.phase} in step {heartbeat.step + 1:,}"
    return f"{heartbeat.phase} after {counted(heartbeat.step, 'step')}"


def _slowest_rank_text(rank: int, heartbeat: Heartbeat | None, num_others: int) -> str:
    """Return what the slowest rank does, and how many ranks wait for it."""
    if heartbeat is None:
        text = f"rank {rank} has never written a heartbeat"
    elif not heartbeat.stalled:
        text = (
            f"rank {rank} ({heartbeat.node}) does not answer: its last heartbeat was "
            f"{time.time() - heartbeat.time:.0f} s ago, after {counted(heartbeat.step, 'step')}, "
            f"{heartbeat.phase}"
        )
    else:
        text = f"rank {rank} ({heartbeat.node}) is {_place(heartbeat)}, at {heartbeat.where}"
        if heartbeat.phase == "reading data":
            text += ". It waits for its data: num_workers=0 shows whether the data set hangs"
    if not num_others:
        return text
    verb = "rank waits" if num_others == 1 else f"{num_others} ranks wait"
    return f"{text}; the other {verb} for it"


def _different_calls_text(heartbeats: list[Heartbeat | None]) -> str | None:
    """Return the text about ranks that wait for each other in different calls, or None."""
    ranks: dict[str, int] = {}
    for heartbeat in heartbeats:
        if heartbeat is None or not (heartbeat.stalled and heartbeat.waits):
            return None
        ranks.setdefault(heartbeat.where, heartbeat.rank)
    if len(ranks) < 2:
        return None
    places = (f"rank {rank} at {where}" for where, rank in list(ranks.items())[:2])
    return (
        f"the ranks wait for each other in different calls, {' and '.join(places)}: not all of "
        "them make the same collective calls in the same order"
    )


def _hang_failure(
    heartbeats: list[Heartbeat | None], hang: Hang, missing: tuple[int, str] | None
) -> Failure:
    """Return the failure of a run that hangs, which names the slowest rank.

    Args:
        heartbeats: The last heartbeat of each rank; None for a rank that wrote none.
        hang: The limit that was reached.
        missing: The rank that is behind in its collective calls, and a clause about it, if known.
    """

    def progress(rank: int) -> tuple[bool, int, int, bool]:
        heartbeat = heartbeats[rank]
        if heartbeat is None:
            return False, 0, 0, False
        phase = _ORDER.index(heartbeat.phase)
        return heartbeat.stalled, heartbeat.step, phase, heartbeat.waits

    slowest = min(range(len(heartbeats)), key=progress)
    are_equal = all(progress(rank) == progress(slowest) for rank in range(len(heartbeats)))
    if missing is not None and are_equal:
        slowest = missing[0]
    heartbeat = heartbeats[slowest]
    text = _different_calls_text(heartbeats) or _slowest_rank_text(
        slowest, heartbeat, len(heartbeats) - 1
    )
    if missing is not None:
        text += f". Of the collective calls, {missing[1]}"
    return Failure(
        rank=slowest,
        node="" if heartbeat is None else heartbeat.node,
        pid=0 if heartbeat is None else heartbeat.pid,
        time=time.time(),
        error="Hang",
        message=(f"{_hang_text(hang)}: {text}. The stacks of all threads are in the logs."),
        exit_code=EXIT_FAILED,
    )
