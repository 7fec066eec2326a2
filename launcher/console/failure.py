"""A failed run in words, in one block: who failed first and how, where all were, what now."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator

from launcher.errors import EXIT_USAGE
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.failure_record import Failure
from launcher.runs.heartbeat import read_heartbeats
from launcher.runs.rundir import RunDir, line_count, why_not_writable
from launcher.signals import EXIT_BY_SIGNAL

_MOST_RANKS = 16
"""More are summed up."""


def failure_text(failure: Failure, run_dir: RunDir) -> str:
    """Return what to show of a recorded failure."""
    if failure.exit_code == EXIT_USAGE:
        return f"launcher: {failure.message}"
    head = f"launcher: the run failed on rank {failure.rank} ({failure.node})"
    body = failure.traceback or failure.message
    circumstances = _circumstances(failure.rank, run_dir, failure.log_line)
    return "\n\n".join([head, body.rstrip(), *circumstances])


def death_text(rank: int, exit_code: int, run_dir: RunDir, *, oom_kills: int | None = None) -> str:
    """Return what to show of a rank that ended without a word.

    Args:
        rank: The first that ended.
        exit_code: Negative for a signal.
        run_dir: The run's.
        oom_kills: Processes that the kernel has killed for memory since the run began; None where
            that is not known.
    """
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        how = f"was killed by {name}"
        if name == "SIGKILL":
            how += _why_killed(oom_kills)
        if name == "SIGBUS":
            how += " (a full /dev/shm has this effect: fewer num_workers, or a larger /dev/shm)"
    else:
        how = f"ended with exit code {exit_code}{_in_words(exit_code)}"
    head = f"launcher: the run failed: rank {rank} {how}"
    if reason := why_not_writable(run_dir):
        head += (
            f". Nothing can be written to the run folder, {run_dir.shown}: {reason}, so that the "
            "rank could not record why"
        )
    last = line_count(run_dir.log(rank))
    return "\n\n".join([head, *_circumstances(rank, run_dir, last)])


def _in_words(exit_code: int) -> str:
    """Return which signal an exit code stands for, as shells and batch systems have it."""
    try:
        return f" ({signal.Signals(exit_code - EXIT_BY_SIGNAL).name})"
    except ValueError:
        return ""


def _why_killed(oom_kills: int | None) -> str:
    if oom_kills is None:
        return " (the kernel does that when memory runs out: see `dmesg`)"
    if oom_kills:
        return (
            f": host memory ran out (the cgroup counts {oom_kills} such since the run began). Use "
            "fewer num_workers or a smaller prefetch_factor, or ask for more memory"
        )
    return " (not for want of memory: the cgroup's count of such has not risen)"


def _circumstances(rank: int, run_dir: RunDir, line: int | None) -> Iterator[str]:
    """Yield where the ranks were, what to do next, and what to read."""
    ranks = list(read_heartbeats(run_dir))
    shown = [f"rank {each.rank}: step {each.step:,}, {each.phase}" for each in ranks[:_MOST_RANKS]]
    if ranks[_MOST_RANKS:]:
        shown.append(f"and {len(ranks) - _MOST_RANKS} more, see {run_dir.health(0).parent}")
    if shown:
        yield "last seen: " + "; ".join(shown)
    if found := list_checkpoints(run_dir):
        command = f"launcher resume {shlex.quote(run_dir.shown)}"
        yield f"next: `{command}` goes on from step {found[0].step:,}"
    yield f"log: {run_dir.log(rank)}" + (f", line {line}" if line else "")
