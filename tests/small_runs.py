"""Runs of a few milliseconds in this process, for tests of what is around the loop."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from launcher import Data, Recipe, make_plan, read_machine
from launcher.engine.backends.local import LocalBackend
from launcher.engine.ranks.output import Output
from launcher.engine.run import train_rank
from launcher.runs.job import ResumeFrom
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest

INPUTS = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))


def squared(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
    """Return the sum of squared outputs."""
    return outputs.square().sum(), len(batch[0])


def recipe(*callbacks: Any, **changes: Any) -> Recipe:
    """Return a regression of 6 steps in 2 epochs with these callbacks."""
    fields: dict[str, Any] = {
        "name": "watched",
        "model": lambda: nn.Linear(4, 1),
        "data": lambda: Data(
            train=TensorDataset(INPUTS[:40]), evaluation=TensorDataset(INPUTS[40:])
        ),
        "loss": squared,
        "batch_size": 16,
        "lr": 0.01,
        "lr_rule": "none",
        "epochs": 2,
        "train_samples": 40,
        "in_memory": True,
        "device": "cpu",
        "checkpoint_every": 2,
        "callbacks": callbacks,
    }
    return Recipe(**fields | changes)


def train(
    folder: Path,
    trained: Recipe,
    start: ResumeFrom | None = None,
    *,
    stop_at: int | None = None,
    stop: StopRequest | None = None,
) -> RunDir:
    """Train in this process, also from a checkpoint or up to a step, and return the run folder."""
    folder.mkdir(exist_ok=True)
    plan = make_plan(trained, read_machine(), nproc_per_node=1)
    output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
    backend = LocalBackend(trained, plan)
    options = {"stop": stop or StopRequest(), "start": start, "last_step": stop_at}
    train_rank(trained, plan, backend, RunDir(folder), output, **options)  # type: ignore[arg-type]
    return RunDir(folder)
