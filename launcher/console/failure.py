"""The text about a failed run: which rank failed and how, where all ranks were, what to do now."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

from launcher.errors import EXIT_USAGE
from launcher.printable import printable, shortened
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.failure_record import Failure
from launcher.runs.files import count_lines
from launcher.runs.heartbeat import read_heartbeats
from launcher.runs.rundir import RunDir, write_error
from launcher.signals import EXIT_BY_SIGNAL

_MAX_LOG_LINES, _MAX_LOG_BYTES = 40, 1 << 14
"""How much of the end of a log is quoted."""

_MAX_RANKS = 16
"""Number of ranks whose last step is shown; the others are counted."""


def failure_text(failure: Failure, run_dir: RunDir) -> str:
    """Return the text about a recorded failure.

    A user's mistake is shown as its message alone. Any other failure is shown with its traceback or
    message, the last step of each rank, the command that resumes the run, and the rank's log.
    """
    if failure.exit_code == EXIT_USAGE:
        return printable(f"launcher: {shortened(failure.message)}")
    head = f"launcher: the run failed on rank {failure.rank} ({failure.node})"
    body = shortened(failure.traceback or failure.message).rstrip()
    context = _context(failure.rank, run_dir, failure.log_line)
    return printable("\n\n".join([head, body, *context]))


def failure_with_log(failure: Failure, run_dir: RunDir) -> str:
    """Return the text about a failure in a run folder that will be removed.

    It quotes the end of the rank's log, where `failure_text` names the log, if the failure does not
    explain itself.
    """
    if failure.exit_code == EXIT_USAGE:
        return printable(f"launcher: {shortened(failure.message)}")
    parts = [
        f"launcher: rank {failure.rank} failed",
        shortened(failure.traceback or failure.message),
    ]
    last_lines = _last_lines(run_dir.log(failure.rank))
    is_repeated = failure.message.strip() in last_lines or last_lines.strip() in failure.message
    if not failure.traceback and last_lines and not is_repeated:
        parts.append(f"its output ended with:\n{last_lines}")
    return printable("\n\n".join(part.rstrip() for part in parts))


def _last_lines(log: Path) -> str:
    """Return the last lines of a log; empty if it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - _MAX_LOG_BYTES, 0))
            lines = file.read().decode(errors="backslashreplace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_MAX_LOG_LINES:])


def death_text(rank: int, exit_code: int, run_dir: RunDir, *, oom_kills: int | None = None) -> str:
    """Return the text about a rank that ended without recording a failure.

    Args:
        rank: The first rank that ended.
        exit_code: Its exit code, or the negative number of the signal that killed it.
        run_dir: The run folder.
        oom_kills: Processes that the kernel has killed for lack of memory since the run began;
            None if unknown.
    """
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        how = f"was killed by {name}"
        if name == "SIGKILL":
            how += _sigkill_reason(oom_kills)
        if name == "SIGBUS":
            how += " (a full /dev/shm causes this: use fewer num_workers, or a larger /dev/shm)"
        if name == "SIGSEGV" and os.environ.get("TORCH_DISTRIBUTED_DEBUG") == "DETAIL":
            how += " (TORCH_DISTRIBUTED_DEBUG=DETAIL may cause this in torch's DDP: try INFO)"
    elif exit_code == 0:
        how = "ended with exit code 0 before the run did: something in it called os._exit()"
    else:
        how = f"ended with exit code {exit_code}{_signal_name(exit_code)}"
    head = f"launcher: the run failed: rank {rank} {how}"
    if reason := write_error(run_dir):
        head += (
            f". The rank could not record why, because the run folder {run_dir.shown} cannot be "
            f"written: {reason}"
        )
    last_line = count_lines(run_dir.log(rank))
    return printable("\n\n".join([head, *_context(rank, run_dir, last_line)]))


def _signal_name(exit_code: int) -> str:
    """Return the signal that an exit code above 128 stands for in shells and batch systems."""
    try:
        return f" ({signal.Signals(exit_code - EXIT_BY_SIGNAL).name})"
    except ValueError:
        return ""


def _sigkill_reason(oom_kills: int | None) -> str:
    """Return whether lack of memory explains a SIGKILL."""
    if oom_kills is None:
        return " (the kernel does that when memory runs out: see `dmesg`)"
    if oom_kills:
        return (
            f": host memory ran out (the cgroup counts {oom_kills} out-of-memory kills since the "
            "run began). Use fewer num_workers or a smaller prefetch_factor, or ask for more memory"
        )
    return " (memory did not run out: the cgroup counts no out-of-memory kill since the run began)"


def _context(rank: int, run_dir: RunDir, line: int | None) -> Iterator[str]:
    """Yield where the ranks were, how to resume the run, and which log to read.

    Args:
        rank: The rank that failed.
        run_dir: The run folder.
        line: The line of its log to read; None or 0 names no line.
    """
    ranks = list(read_heartbeats(run_dir))
    places = [f"rank {beat.rank}: step {beat.step:,}, {beat.phase}" for beat in ranks[:_MAX_RANKS]]
    if ranks[_MAX_RANKS:]:
        places.append(f"and {len(ranks) - _MAX_RANKS} more, see {run_dir.health(0).parent}")
    if places:
        yield "last seen: " + "; ".join(places)
    if checkpoints := list_checkpoints(run_dir):
        command = f"launcher resume {shlex.quote(run_dir.shown)}"
        yield f"next: `{command}` resumes the run from step {checkpoints[0].step:,}"
    yield f"log: {run_dir.log(rank)}" + (f", line {line}" if line else "")
