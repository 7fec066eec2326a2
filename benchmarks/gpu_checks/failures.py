"""Checks of ranks that die, hang or are stopped, and of runs that are resumed."""

from __future__ import annotations

import json
import os
import signal
import time

from contest import HERE

from gpu_checks.machine import Machine, Verdict, steps_of, wait_until
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.heartbeat import read_heartbeat

SECONDS_TO_END = 15
"""Longest time from the death of a rank to the end of the run."""


def killed_rank(machine: Machine) -> Verdict:
    """Measure the time from the death of a rank to the end of the run."""
    with machine.started("digits", "killed", "epochs=500") as (process, out):
        wait_until(lambda: len(steps_of(out)) > 3, process)
        beat = read_heartbeat(out, machine.ranks - 1)
        assert beat is not None
        os.kill(beat.pid, signal.SIGKILL)
        started = time.monotonic()
        process.communicate(timeout=120)
        seconds = time.monotonic() - started
    ends = process.returncode == 1 and seconds < SECONDS_TO_END
    return f"{seconds:.1f} s, exit code {process.returncode}", f"< {SECONDS_TO_END} s, 1", ends


def named_hang(machine: Machine) -> Verdict:
    """Let the last rank sleep in a step, and look whether the failure names it."""
    last = machine.ranks - 1
    recipe = HERE.parent / "tests/recipes/failing.py"
    settings = ("how=sleep", f"rank={last}")
    with machine.started(str(recipe), "hang", *settings) as (process, _):
        _, stderr = process.communicate(timeout=120)
    # Over gloo each rank waits in its own line, so a rehearsal sees no collective call.
    needed = ("rank " if machine.is_rehearsal else "collective call", f"rank {last} ")
    is_named = all(text in stderr for text in needed)
    return "named" if is_named else "not named", f"rank {last} and its call", is_named


def stopped_and_resumed(machine: Machine) -> Verdict:
    """Stop a run by SIGTERM, and resume it on another number of ranks.

    A run of several ranks goes on on one. A run of one GPU goes on on two CPU ranks.
    """
    with machine.started("digits", "stopped", "epochs=100") as (process, out):
        wait_until(lambda: len(steps_of(out)) > 3, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    step = list_checkpoints(out)[0].step
    others = ("1",) if machine.ranks > 1 else ("2", "device=cpu")
    machine.launcher("resume", "stopped", "-q", f"steps={step + 12}", "-n", *others)
    steps = json.loads(out.result.read_text())["steps"]
    passed = process.returncode == 75 and steps == step + 12
    return f"exit code {process.returncode}, then {steps} steps", f"75, then {step + 12}", passed
