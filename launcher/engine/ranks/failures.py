"""What a rank does when it fails: exactly one error of a run is recorded and shown.

The rank that fails first records its error and shows it. Ranks that fail as a consequence stay
quiet and wait for the agent to end them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import signal
import time
from bdb import BdbQuit
from dataclasses import replace

import torch

from launcher.console.failure import failure_text
from launcher.engine.ranks.output import Output
from launcher.environment.world import World
from launcher.errors import EXIT_FAILED, LauncherError, LostRankError, TrainingError
from launcher.printable import class_name, error_line, noted_text_of, text_of, traceback_of
from launcher.runs.failure_record import Failure, record_failure
from launcher.runs.files import count_lines
from launcher.runs.heartbeat import is_running, read_heartbeats
from launcher.runs.redaction import redacted
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest

_LOST_PEER_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "NCCL communicator was aborted",
    "remote process exited",
)
"""Parts of the messages of gloo and NCCL about a connection that another rank closed."""

_HOST_MEMORY_SIGNS = ("can't allocate memory", "bad_alloc")
_GPU_MEMORY_SIGNS = (
    "out of memory",  # CUDA, HIP and NCCL
    "_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER and cuFFT, which allocate workspaces of their own
    "unable to find an engine to execute this computation",  # cuDNN, for lack of a workspace
)
"""Parts of the messages of errors of memory that are not of torch's class for them."""

_LOST_WORKER = re.compile(r"DataLoader worker.* (killed by signal|exited unexpectedly)")
_SECONDS_TO_BE_ENDED = 10
"""Longest wait of a rank whose error is a consequence, until it ends itself."""

_SECONDS_FOR_THE_PEER = 5
"""Longest time in which the agent notices a rank that ended, and ends the others."""


def fail(
    error: BaseException,
    world: World,
    run_dir: RunDir,
    *,
    output: Output,
    shows: bool,
    stop: StopRequest | None = None,
) -> int:
    """Record `error` as the failure of the run if it is the first; return the exit code.

    This function raises nothing, whatever the error, its text and the disk are like: an error that
    no file can hold is shown on the terminal.

    A lost connection to another rank is a consequence, not the cause. This rank then waits for the
    agent to end it, so that the agent notices the rank that caused the loss first. A rank that
    fails after another also waits: its exit would make the agent end the first one, which may still
    be reporting its error.

    Args:
        error: The exception that the rank raised.
        world: The rank and its world.
        run_dir: The run folder, in which the ranks agree which failure was first.
        output: The rank's log, which gets the error in any case, and its terminal.
        shows: Whether this rank shows the error; otherwise the launcher does.
        stop: The stop request of this rank; None creates one.
    """
    try:
        return _report(error, world, run_dir, output, stop or StopRequest(), shows=shows)
    except BaseException as second:  # noqa: BLE001  # the exit of the rank must not depend on it
        with contextlib.suppress(BaseException):
            text = f"launcher: rank {world.rank} failed: {error_line(error)}\n"
            text += f"launcher: while it reported this error: {traceback_of(second)}"
            output.errors.write(text)
            output.errors.flush()
        return EXIT_FAILED


def _report(
    error: BaseException,
    world: World,
    run_dir: RunDir,
    output: Output,
    stop: StopRequest,
    *,
    shows: bool,
) -> int:
    _ignore_dead_workers()
    failure = replace(describe(error, world), log_line=1 + count_lines(run_dir.log(world.rank)))
    logged = redacted(traceback_of(error, whole=True)) if failure.traceback else failure.message
    print(logged, file=output.log, flush=True)
    if failure.lost_peer:
        stop.wait_to_be_ended(_SECONDS_FOR_THE_PEER)
        failure = _early_exit(run_dir, world) or failure
    if failure.lost_peer:
        stop.wait_to_be_ended(_SECONDS_TO_BE_ENDED)
    record = record_failure(run_dir, failure)
    if record == "later":
        stop.wait_to_be_ended(_SECONDS_TO_BE_ENDED)
    elif shows or record == "unwritten":
        print(failure_text(failure, run_dir), file=output.errors, flush=True)
    return failure.exit_code


def _ignore_dead_workers() -> None:
    """Reset the handler of SIGCHLD, so that torch does not raise while an error is reported.

    torch's handler raises in the main thread whenever a DataLoader worker has died, even if that
    death is the error being reported, and even during this call.
    """
    while True:
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        except RuntimeError:
            continue
        return


def _early_exit(run_dir: RunDir, world: World) -> Failure | None:
    """Return the failure of another rank of this node that exited before the run's end, or None."""
    for peer in read_heartbeats(run_dir):
        is_local_peer = peer.rank != world.rank and peer.node == platform.node()
        if is_local_peer and not is_running(peer.pid):
            error = TrainingError(
                f"Rank {peer.rank} ({peer.node}) ended with exit code 0 before the run did, last "
                f"seen at step {peer.step:,}, {peer.phase}: something in it called exit()."
            )
            return replace(describe(error, world), rank=peer.rank, pid=peer.pid)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on a GPU or on the host."""
    if isinstance(error, MemoryError) or _is_out_of_gpu_memory(error):
        return True
    if isinstance(error, OSError):  # of a fork or a map
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _holds_any(error, _HOST_MEMORY_SIGNS)


def _is_out_of_gpu_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _holds_any(error, _GPU_MEMORY_SIGNS)
    )


def _holds_any(error: BaseException, signs: tuple[str, ...]) -> bool:
    text = text_of(error)
    return any(sign in text for sign in signs)


def describe(error: BaseException, world: World) -> Failure:
    """Return the failure of this process, a rank that raised `error`.

    Errors that a user can act upon carry advice in their message. A `LauncherError` explains itself
    and has no traceback. Keys and passwords are removed, and the texts are shortened and printable.
    """
    out_of_memory = is_out_of_memory(error)
    if _LOST_WORKER.search(text_of(error)):
        error = TrainingError(
            f"{text_of(error)}\n\nA DataLoader worker died. The kernel kills workers when memory "
            "runs out (see `dmesg`), and SIGBUS means that /dev/shm is full: use fewer num_workers "
            "or a smaller prefetch_factor. num_workers=0 reads the data in the rank itself, which "
            "shows the error of the data set."
        )
    if _is_out_of_gpu_memory(error):
        error = TrainingError(
            f"{text_of(error)}\n\nThe GPU's memory ran out. A smaller micro_batch_size uses less "
            "of it and changes no step, because accumulation keeps the batch size. "
            "activation_checkpointing=true, precision=bf16, strategy=fsdp and offload=cpu also use "
            "less. If much memory is reserved but unallocated, it is fragmented: set "
            "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment."
        )
    if isinstance(error, BdbQuit):
        error = TrainingError("The command q of the debugger ended the run; c continues it.")
    is_explained = isinstance(error, LauncherError)
    text = text_of(error)
    return Failure(
        rank=world.rank,
        node=platform.node(),
        pid=os.getpid(),
        time=time.time(),
        error=class_name(error),
        message=redacted(noted_text_of(error)),
        traceback="" if is_explained else redacted(traceback_of(error)),
        exit_code=error.exit_code if isinstance(error, LauncherError) else EXIT_FAILED,
        out_of_memory=out_of_memory,
        lost_peer=isinstance(error, LostRankError)
        or (not is_explained and any(sign in text for sign in _LOST_PEER_SIGNS)),
    )
