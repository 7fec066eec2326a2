"""Train runs with `max_time` on several ranks, resume them on others, and repeat them.

A program for test_max_time.py. It forks 2 ranks, then 1, then 3; each group trains all its runs.
"""

from __future__ import annotations

import importlib
import io
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "recipes"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import torch
from parts import norms
from torch.multiprocessing.spawn import start_processes
from worlds import worlds

from launcher import Recipe, make_plan, read_machine
from launcher.engine.process_group import join
from launcher.engine.ranks.output import Output
from launcher.engine.run import train_rank
from launcher.environment.world import World, find_world
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.history import History
from launcher.runs.job import ResumeFrom
from launcher.runs.run_record import RunRecord, write_run
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.signals import StopRequest

COMMON: dict[str, Any] = {
    "epochs": 2_000,
    "max_time": "4s",
    "checkpoint_every": 10,
    "keep_checkpoints": 1_000,
}
NORMS = replace(norms(), strategy="fsdp", num_workers=1, **COMMON)
"""Exact sums over virtual ranks, BatchNorm, dropout, evaluations, and workers that read ahead."""

WORLDS = replace(worlds(), strategy="zero2", **COMMON)

FIRST_SAVED = 1
"""The checkpoint that a run with `max_time` saves after its first step."""


class Trainer:
    """Trains runs one after the other in one process group.

    Args:
        folder: The folder of the runs.
        world: This rank.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self._folder, self._world = folder, world
        self._output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
        self._backends: list[Any] = []  # keep alive the process group that all runs share

    def __call__(
        self,
        recipe: Recipe,
        name: str,
        *,
        step: int | None = None,
        last_step: int | None = None,
    ) -> None:
        """Train a run in the folder `name`; resume it from the checkpoint of `step` if given."""
        plan = make_plan(recipe, read_machine(), nproc_per_node=self._world.world_size)
        run_dir = RunDir(self._folder / name)

        def make_run_dir() -> RunDir:
            if step is None:
                create_run_dir(run_dir.path, "timed")
            write_run(run_dir, RunRecord(recipe="timed.py:timed", plan=plan.to_dict()))
            return run_dir

        backend, _ = join(recipe, plan, self._world, make_run_dir)
        if torch.distributed.is_initialized():
            self._world = replace(self._world, store=None)  # later runs use the same group
        train_rank(
            recipe,
            plan,
            backend,
            run_dir,
            self._output,
            stop=StopRequest(),
            start=None if step is None else ResumeFrom(step=step),
            last_step=last_step,
        )
        self._backends.append(backend)

    def repeat(self, recipe: Recipe, name: str, *, original: str) -> None:
        """Take the first steps of the run `original` without `max_time`, and resume with its steps.

        Args:
            recipe: The recipe.
            name: The folder of the run.
            original: The folder of the run to repeat.
        """
        timed = History(RunDir(self._folder / original)).plan.timed_steps
        assert timed is not None
        plain = replace(recipe, max_time=None)
        self(plain, name, last_step=timed.first_step)
        self(replace(plain, epochs=None, steps=timed.steps), name, step=timed.first_step)


def train(rank: int, folder: Path, ranks: int) -> None:
    """Train the runs of this number of ranks, as one of the ranks."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", ranks)):
        os.environ |= {name: str(value), f"LOCAL_{name}": str(value)}
    trainer = Trainer(folder, replace(find_world(), store=folder / f"store{ranks}"))
    if ranks == 2:
        trainer(NORMS, "norms")
        trainer(WORLDS, "worlds")
        trainer.repeat(WORLDS, "worlds-again", original="worlds")
    elif ranks == 1:
        trainer.repeat(replace(NORMS, strategy="ddp"), "norms-again", original="norms")
        trainer(replace(NORMS, strategy="ddp"), "norms-on1", step=FIRST_SAVED)
    else:
        _, newest_unfinished, *_ = list_checkpoints(RunDir(folder / "norms"))
        trainer(NORMS, "norms-on3", step=newest_unfinished.step)
    sys.stdout.flush()
    os._exit(0)


def main(folder: Path) -> None:
    """Train all runs in `folder`."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for module in ("accelerate", "fsdp", "deepspeed"):
        importlib.import_module(f"launcher.engine.backends.{module}")
    for ranks in (2, 1, 3):
        start_processes(train, (folder, ranks), ranks, start_method="fork")  # type: ignore[no-untyped-call]
        if ranks == 2:
            for name in ("norms-on1", "norms-on3"):
                shutil.copytree(folder / "norms", folder / name)


if __name__ == "__main__":
    main(Path.cwd())
