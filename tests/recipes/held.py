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
    """Return a recipe whose rank 1 kills the process that writes its checkpoints, after step 14."""
    return replace(paced(pause=pause), name="paced", callbacks=(_Killer(),))


class _Hold:
    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, context: CallbackContext) -> None:
        """Wait on rank 0, if it is time."""
        folder = context.run_dir.parent
        if context.rank > 0 or (folder / "go").exists():
            return
        events = read_events(RunDir(context.run_dir))
        saved = [each.step for each in events if isinstance(each, Saved) and each.place == QUICK]
        if saved and saved[-1] >= self._step:
            (folder / "held").write_text(str(saved[-1]))
            while not (folder / "go").exists():
                time.sleep(0.02)


class _Killer:
    def after_step(self, context: CallbackContext) -> None:
        """Kill the process beside rank 1, if it is time."""
        if context.rank != 1 or context.step != 14:
            return
        for child in psutil.Process().children():
            if any("shard_files" in word for word in child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)
