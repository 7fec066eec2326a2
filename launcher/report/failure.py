"""A failed run in words: the first failure, once, and where to read on."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from launcher.errors import EXIT_USAGE
from launcher.rundir import RunDir


def failure_text(failure: Mapping[str, Any], run_dir: RunDir) -> str:
    """Return what to show of a recorded failure."""
    if failure["exit_code"] == EXIT_USAGE:
        return f"launcher: {failure['message']}"
    rank, node = failure["rank"], failure["node"]
    head = f"launcher: the run failed on rank {rank} ({node})"
    body = failure["traceback"] or failure["message"]
    return f"{head}\n\n{body.rstrip()}\n\nlog: {run_dir.log(rank)}"


def death_text(rank: int, exit_code: int, run_dir: RunDir) -> str:
    """Return what to show of a rank that ended without a word."""
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        how = f"was killed by {name}"
        if name == "SIGKILL":
            how += " (the kernel does that when memory runs out: see `dmesg`)"
        if name == "SIGBUS":
            how += " (a full /dev/shm has this effect: fewer num_workers, or a larger /dev/shm)"
    else:
        how = f"ended with exit code {exit_code}"
    return f"launcher: the run failed: rank {rank} {how}\n\nlog: {run_dir.log(rank)}"
