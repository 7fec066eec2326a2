"""A small GAN with two objectives, and its training in the process of a test."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from launcher import Data, Objective, Recipe, constant, make_plan, read_machine, sgd
from launcher.engine.backends.local import LocalBackend
from launcher.engine.ranks.output import Output
from launcher.engine.run import train_rank
from launcher.recipes import gan
from launcher.recipes.digits import read_digits
from launcher.runs.rundir import RunDir


def train(folder: Path, trained: Recipe, source: RunDir | None = None, **options: Any) -> RunDir:
    """Train in this process, perhaps resumed from a copy of `source`; return the run folder."""
    run_dir = RunDir(folder / f"run{len(list(folder.iterdir()))}")
    if source is None:
        run_dir.path.mkdir()
    else:
        shutil.copytree(source.path, run_dir.path)
    plan = make_plan(trained, read_machine(), nproc_per_node=1)
    output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
    train_rank(trained, plan, LocalBackend(trained, plan), run_dir, output, **options)
    return run_dir


def small_gan(**changes: Any) -> Recipe:
    """Return the GAN with ten steps of SGD, whose data set draws nothing."""
    images, labels = read_digits()
    latents = torch.randn(96, gan.LATENTS, generator=torch.Generator().manual_seed(5))
    samples = torch.utils.data.TensorDataset(images[:96], labels[:96], latents)
    fields: dict[str, Any] = {
        "data": lambda: Data(train=samples),
        "steps": 10,
        "epochs": None,
        "train_samples": 96,
        "optimizer": sgd(momentum=0.9),
        "schedule": constant(),
        "lr": 0.05,
        "max_grad_norm": 0.7,
        "device": "cpu",
    }
    return replace(gan.gan(generator_lr=0.2), **fields | changes)


def every(built: Recipe, *intervals: int) -> tuple[Objective, ...]:
    """Return the objectives of a recipe with these intervals between their turns."""
    pairs = zip(built.objectives, intervals, strict=True)
    return tuple(replace(objective, every=interval) for objective, interval in pairs)
