"""What a rank does when it fails: one rank's error is kept and shown, once."""

from __future__ import annotations

import os
import platform
import re
import signal
import time
import traceback
from dataclasses import replace
from typing import TextIO

import torch

from launcher.console.failure import failure_text
from launcher.environment.world import World
from launcher.errors import EXIT_FAILED, LauncherError, LostRankError, TrainingError
from launcher.runs.failure_record import Failure, record_failure
from launcher.runs.heartbeat import is_running, read_heartbeats
from launcher.runs.redaction import redacted
from launcher.runs.rundir import RunDir, line_count
from launcher.signals import StopRequest

_PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "NCCL communicator was aborted",
    "remote process exited",
)
_NO_MEMORY = ("can't allocate memory", "bad_alloc", "out of memory")
_WORKER_LOST = re.compile(r"DataLoader worker.* (killed by signal|exited unexpectedly)")
_SECONDS_TO_BE_ENDED = 10
_SECONDS_FOR_THE_PEER = 5
"""In which whoever started a rank that failed has ended the others."""


def fail(
    error: BaseException,
    world: World,
    run_dir: RunDir,
    *,
    log: TextIO,
    show: TextIO | None,
    stop: StopRequest | None = None,
) -> int:
    """Record `error` as the run's failure if it is the first; return the exit code.

    A rank whose connection to another broke is a consequence, not the cause. It waits for the
    agent to end it, so that the rank that caused it is the first to be noticed; so does a rank that
    fails after another, which could otherwise have that one ended in the middle of its words.

    Args:
        error: What was raised.
        world: Which rank raised it.
        run_dir: Where the ranks agree who was first.
        log: This rank's log, where its error is kept in any case.
        show: Where to show it; None leaves that to the process that started the ranks.
        stop: Notes whether this rank has been told to end.
    """
    _hear_no_more_of_workers()
    failure = replace(describe(error, world), log_line=1 + line_count(run_dir.log(world.rank)))
    print(failure.traceback or failure.message, file=log, flush=True)
    stop = stop or StopRequest()
    if failure.lost_peer:
        stop.wait_to_be_ended(_SECONDS_FOR_THE_PEER)
        failure = _departure(run_dir, world) or failure
    if failure.lost_peer:
        stop.wait_to_be_ended(_SECONDS_TO_BE_ENDED)
    if not record_failure(run_dir, failure):
        stop.wait_to_be_ended(_SECONDS_TO_BE_ENDED)
    elif show is not None:
        print(failure_text(failure, run_dir), file=show, flush=True)
    return failure.exit_code


def _hear_no_more_of_workers() -> None:
    """Keep torch from raising again, in the middle of these words, because a worker has died.

    Its handler of SIGCHLD raises wherever the main thread is, also when the death of the worker is
    what is being told.
    """
    while True:
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        except RuntimeError:
            continue
        return


def _departure(run_dir: RunDir, world: World) -> Failure | None:
    """Return the failure of a rank of this node that has ended as if all were well, if one has."""
    for peer in read_heartbeats(run_dir):
        here = peer.rank != world.rank and peer.node == platform.node()
        if here and not is_running(peer.pid):
            error = TrainingError(
                f"Rank {peer.rank} ({peer.node}) ended with exit code 0 before the run did, last "
                f"seen at step {peer.step:,}, {peer.phase}: something called exit() there."
            )
            return replace(describe(error, world), rank=peer.rank, pid=peer.pid)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether there was no memory left, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def describe(error: BaseException, world: World) -> Failure:
    """Return the failure of a rank of this process that raised `error`."""
    if _WORKER_LOST.search(str(error)):
        error = TrainingError(
            f"{error}\n\nA DataLoader worker died. The kernel kills one where memory runs out (see "
            "`dmesg`), and SIGBUS means that /dev/shm is full: use fewer num_workers or a smaller "
            "prefetch_factor. num_workers=0 reads in the rank itself, to see what it does."
        )
    out_of_memory = is_out_of_memory(error)
    if isinstance(error, torch.OutOfMemoryError):
        error = TrainingError(
            f"{error}\n\nThe GPU's memory ran out. A smaller micro_batch_size takes less of it and "
            "changes no step: accumulation makes up the batch. activation_checkpointing=true, "
            "precision=bf16, strategy=fsdp and offload=cpu take less as well."
        )
    known = isinstance(error, LauncherError)
    text = "" if known else "".join(traceback.format_exception(error))
    return Failure(
        rank=world.rank,
        node=platform.node(),
        pid=os.getpid(),
        time=time.time(),
        error=type(error).__name__,
        message=redacted(str(error)),
        traceback=redacted(text),
        exit_code=error.exit_code if isinstance(error, LauncherError) else EXIT_FAILED,
        out_of_memory=out_of_memory,
        lost_peer=isinstance(error, LostRankError)
        or (not known and any(sign in str(error) for sign in _PEER_LOST)),
    )
