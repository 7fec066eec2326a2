"""Digits whose run waits once it has a quick checkpoint, so that a test can disturb it there."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
from worlds import paced

from launcher.runs.events import QUICK, Saved, read_events
from launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from launcher import CallbackContext, Recipe


def held(*, pause: float = 0.05, hold: int = 0) -> Recipe:
    """Return a recipe whose rank 0 waits for a file `go` after a quick checkpoint.

    Args:
        pause: The least seconds of a step.
        hold: The step of that checkpoint, or a later one. The file `held` beside the run folder
            says that rank 0 waits, and `go` is to be there as well.
    """
    return replace(paced(pause=pause), name="paced", callbacks=(_Hold(hold),))


def killing(*, pause: float = 0.05) -> Recipe:
    """Return a recipe whose rank 1 kills its writing process after the first quick checkpoint.

    The file `killed` beside the run folder then has the step.
    """
    return replace(paced(pause=pause), name="paced", callbacks=(_Killer(),))


def _quick_steps(context: CallbackContext) -> list[int]:
    """Return the steps of the quick checkpoints that are complete."""
    events = read_events(RunDir(context.run_dir))
    return [each.step for each in events if isinstance(each, Saved) and each.place == QUICK]


class _Hold:
    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, context: CallbackContext) -> None:
        """Wait on rank 0, if it is time."""
        folder = context.run_dir.parent
        if context.rank > 0 or (folder / "go").exists():
            return
        saved = _quick_steps(context)
        if saved and saved[-1] >= self._step:
            (folder / "held").write_text(str(saved[-1]))
            while not (folder / "go").exists():
                time.sleep(0.02)


class _Killer:
    def after_step(self, context: CallbackContext) -> None:
        """Kill the process beside rank 1, if it is time."""
        killed = context.run_dir.parent / "killed"
        if context.rank != 1 or killed.exists() or not _quick_steps(context):
            return
        killed.write_text(str(context.step))
        for child in psutil.Process().children():
            if any("shard_files" in word for word in child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)
