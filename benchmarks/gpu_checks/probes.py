"""Measurements that need torch in their process: `python -m gpu_checks.probes NAME DEVICE`."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from images import images
from torch import Tensor

from gpu_checks.here import plan_of, train
from launcher.engine.backends.local import LocalBackend
from launcher.recipe.recipe import Recipe

WARM_UP = 8
"""Steps that are left out: they create state, and cuDNN chooses its kernels."""

COPIED_BYTES, NUM_COPIES = 256 << 20, 8


class HostEvent:
    """Stands in for a CUDA event in a rehearsal on CPU ranks."""

    def __init__(self, *, enable_timing: bool) -> None:
        del enable_timing
        self._time = 0.0

    def record(self) -> None:
        """Take the time."""
        self._time = time.perf_counter()

    def elapsed_time(self, later: HostEvent) -> float:
        """Return the milliseconds up to a later event."""
        return 1000 * (later._time - self._time)


class QuietReads(LocalBackend):
    """A backend whose reads may wait for the device, while any other wait is an error."""

    is_strict = False

    def read(self, values: Tensor) -> Any:
        """Return the values of a tensor as numbers."""
        torch.cuda.set_sync_debug_mode("default")
        numbers = super().read(values)
        if self.is_strict:
            torch.cuda.set_sync_debug_mode("error")
        return numbers


def recipe_for(device: str) -> Recipe:
    """Return the recipe of the probes, which is tiny in a rehearsal."""
    if device == "cpu":
        return replace(images(samples=256, batch=16, width=8, size=16), device="cpu")
    return images(samples=16384)


def step_time(device: str, folder: Path) -> dict[str, Any]:
    """Return the seconds of a step as launcher records them, and between CUDA events."""
    base = recipe_for(device)
    make_event: Any = HostEvent if device == "cpu" else torch.cuda.Event
    events: list[Any] = []

    def forward(model: Any, batch: Any) -> Any:
        if torch.is_grad_enabled():
            events.append(make_event(enable_timing=True))
            events[-1].record()
        return base.forward(model, batch)

    recipe = replace(base, forward=forward)
    rows = train(recipe, LocalBackend(recipe, plan_of(recipe)), folder)
    torch.get_device_module(device).synchronize()
    events = events[-len(rows) :]  # the trial before the first step calls forward as well
    first = len(rows) // 4
    seconds = events[first].elapsed_time(events[-1]) / 1000 / (len(rows) - 1 - first)
    recorded = sum(row["step_seconds"] for row in rows[first:-1]) / (len(rows) - 1 - first)
    return {"recorded": recorded, "events": seconds}


def waits(device: str, folder: Path) -> dict[str, Any]:
    """Return the first line at which the host waits for the device between two reads, or ""."""
    if device == "cpu":
        return {"not measurable": "it needs a GPU"}
    base = recipe_for(device)
    assert base.train_samples is not None
    num_steps = base.train_samples // (base.batch_size or 1)
    calls, where = 0, ""

    def forward(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        backend.is_strict = WARM_UP < calls < num_steps
        torch.cuda.set_sync_debug_mode("error" if backend.is_strict else "default")
        return base.forward(model, batch)

    recipe = replace(base, forward=forward)
    backend = QuietReads(recipe, plan_of(recipe))
    try:
        train(recipe, backend, folder)
    except RuntimeError as error:
        if "synchronizing CUDA" not in str(error):
            raise
        traceback.print_exc()
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f[0]]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return {"where": where, "steps": num_steps - WARM_UP}


def copies(device: str, folder: Path) -> dict[str, Any]:
    """Return the bytes per second of copies from pinned and from pageable memory."""
    del folder
    if device == "cpu":
        return {"not measurable": "it needs a GPU"}
    target = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    pageable = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    results = {}
    for name, source in (("pageable", pageable), ("pinned", pageable.pin_memory())):
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(NUM_COPIES):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        results[name] = NUM_COPIES * COPIED_BYTES / (time.perf_counter() - began)
    return results


PROBES: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "step_time": step_time,
    "waits": waits,
    "copies": copies,
}

if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        print(json.dumps(PROBES[sys.argv[1]](sys.argv[2], Path(temporary))))
