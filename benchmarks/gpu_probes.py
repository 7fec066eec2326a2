"""Measurements for gpu.py that need CUDA, each in a process of its own: `gpu_probes.py NAME`."""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from images import images
from torch import Tensor
from torch.utils.data import DataLoader

from launcher import Recipe, make_plan, read_machine
from launcher.engine.backends.local import LocalBackend
from launcher.engine.ranks.output import Output
from launcher.engine.run import train_rank
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.planning.plan import Plan
from launcher.runs.rundir import RunDir

WARM_UP = 8
"""Steps that are left out: they create state, and cuDNN chooses its kernels."""


class QuietReads(LocalBackend):
    """A backend whose reads do not count as waits of the host."""

    is_counting = False

    def read(self, values: Tensor) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        numbers = super().read(values)
        if self.is_counting:
            torch.cuda.set_sync_debug_mode("warn")
        return numbers


def plan_of(recipe: Recipe) -> Plan:
    """Return the plan of a recipe for this process alone."""
    return make_plan(recipe, read_machine(), nproc_per_node=1)


def train(recipe: Recipe, backend: LocalBackend, folder: Path) -> list[dict[str, Any]]:
    """Train in this process, and return the lines of the steps."""
    output = Output(terminal=io.StringIO(), errors=sys.stderr, log=io.StringIO())
    train_rank(recipe, backend.plan, backend, RunDir(folder), output)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def step_time(folder: Path) -> dict[str, float]:
    """Return the seconds of a step as launcher records them, and between CUDA events."""
    base = images(samples=16384)
    make_event: Any = torch.cuda.Event
    events: list[Any] = []

    def forward(model: Any, batch: Any) -> Any:
        if torch.is_grad_enabled():
            events.append(make_event(enable_timing=True))
            events[-1].record()
        return base.forward(model, batch)

    recipe = replace(base, forward=forward)
    rows = train(recipe, LocalBackend(recipe, plan_of(recipe)), folder)
    torch.cuda.synchronize()
    events = events[-len(rows) :]  # the trial before the first step calls forward as well
    first = len(rows) // 4
    seconds = events[first].elapsed_time(events[-1]) / 1000 / (len(rows) - 1 - first)
    recorded = sum(row["step_seconds"] for row in rows[first:-1]) / (len(rows) - 1 - first)
    return {"recorded": recorded, "events": seconds}


def waits(folder: Path) -> dict[str, int]:
    """Return how often the host waits for the device between two reads."""
    base = images(samples=16384)
    num_steps = 16384 // 256
    calls = 0

    def forward(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        backend.is_counting = WARM_UP < calls < num_steps
        torch.cuda.set_sync_debug_mode("warn" if backend.is_counting else "default")
        return base.forward(model, batch)

    recipe = replace(base, forward=forward)
    backend = QuietReads(recipe, plan_of(recipe))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(recipe, backend, folder)
    found = [warning for warning in caught if "synchronizing CUDA" in str(warning.message)]
    for warning in found[:5]:
        print(f"{warning.filename}:{warning.lineno}: {warning.message}", file=sys.stderr)
    return {"waits": len(found), "steps": num_steps - WARM_UP}


def plain_loop(folder: Path) -> dict[str, float]:
    """Return the samples per second of launcher and of a plain loop with the same parts."""
    recipe = images(samples=16384)
    plan = plan_of(recipe)
    rows = train(recipe, LocalBackend(recipe, plan), folder)
    second_half = rows[len(rows) // 2 :]
    seconds = sum(row["step_seconds"] for row in second_half)
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    model = recipe.model().to(device)
    optimizer = make_optimizer(recipe, model, plan.lr)
    loader = DataLoader(
        recipe.data().train,
        batch_size=plan.batch_size,
        shuffle=True,
        num_workers=plan.workers_per_rank,
        pin_memory=True,
        drop_last=True,
    )
    half, began = len(loader) // 2, 0.0
    for step, batch in enumerate(loader):
        if step == half:
            torch.cuda.synchronize()
            began = time.perf_counter()
        inputs, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
        total, count = recipe.loss(model(inputs), (inputs, targets))
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    plain = (len(loader) - half) * plan.batch_size / (time.perf_counter() - began)
    return {"launcher": len(second_half) * plan.batch_size / seconds, "plain": plain}


PROBES = {"step_time": step_time, "waits": waits, "plain_loop": plain_loop}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        run_folder = Path(temporary) / "run"
        run_folder.mkdir()
        print(json.dumps(PROBES[sys.argv[1]](run_folder)))
