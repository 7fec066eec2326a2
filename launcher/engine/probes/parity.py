"""Two runs compared: what must be equal exactly, and what to rounding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from launcher.runs.rundir import RunDir

_EXACT = {"samples": "sample ids", "lr": "learning rate", "items": "item counts"}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a run left behind, by step."""

    samples: list[list[int]]
    """The sample ids of each step over all ranks and micro-steps, sorted."""

    lr: list[float]
    items: list[int]
    loss: list[float]
    grad_norm: list[float]
    weights: dict[str, Tensor]
    """The final weights."""


@dataclass(frozen=True, kw_only=True)
class ParityDifference:
    """How far a run is from another."""

    unequal: dict[str, int]
    """What has to be equal and is not: its name, and the first step, counted from 1."""

    loss: float
    """Largest relative difference of a step."""

    grad_norm: float
    """Largest relative difference of a step."""

    weights: float
    """Largest difference of a weight, relative to the largest weight of its tensor."""

    first_step: int | None
    """The first step with a loss or gradient norm beyond the tolerance, counted from 1."""

    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether nothing differs but by rounding."""
        largest = max(self.loss, self.grad_norm, self.weights)
        return not self.unequal and largest <= self.tolerance


def read_trace(run_dir: RunDir) -> Trace:
    """Read the folder of a finished run with record_samples=true."""
    rows = [row for row in _lines(run_dir.metrics) if "loss" in row]
    samples: dict[int, list[int]] = {}
    for path in run_dir.samples(0).parent.iterdir():
        for line in _lines(path):
            taken = samples.setdefault(line["step"], [])
            taken += [index for micro_batch in line["micro_batches"] for index in micro_batch]
    return Trace(
        samples=[sorted(samples[step]) for step in sorted(samples)],
        lr=[row["lr"] for row in rows],
        items=[row["items"] for row in rows],
        loss=[row["loss"] for row in rows],
        grad_norm=[row["grad_norm"] or 0.0 for row in rows],
        weights=safetensors.torch.load_file(run_dir.model),
    )


def compare(wanted: Trace, found: Trace, tolerance: float) -> ParityDifference:
    """Return how far `found` is from `wanted`.

    Args:
        wanted: The reference.
        found: Another run of the same recipe.
        tolerance: The relative difference that counts as rounding.
    """
    unequal = {
        words: step
        for name, words in _EXACT.items()
        if (step := _first(getattr(wanted, name), getattr(found, name), lambda a, b: a != b))
    }

    def is_beyond(a: float, b: float) -> bool:
        return not _relative(a, b) <= tolerance

    steps = [
        step
        for name in ("loss", "grad_norm")
        if (step := _first(getattr(wanted, name), getattr(found, name), is_beyond))
    ]
    return ParityDifference(
        unequal=unequal,
        loss=max(map(_relative, wanted.loss, found.loss)),
        grad_norm=max(map(_relative, wanted.grad_norm, found.grad_norm)),
        weights=max(
            _distance(weight, found.weights[name]) for name, weight in wanted.weights.items()
        ),
        first_step=min(steps, default=None),
        tolerance=tolerance,
    )


def _first(wanted: list[Any], found: list[Any], differs: Any) -> int | None:
    pairs = enumerate(zip(wanted, found, strict=False), start=1)
    if step := next((step for step, (a, b) in pairs if differs(a, b)), None):
        return step
    return min(len(wanted), len(found)) + 1 if len(wanted) != len(found) else None


def _relative(wanted: float, found: float) -> float:
    return 0.0 if wanted == found else abs(found - wanted) / max(abs(wanted), 1e-30)


def _distance(wanted: Tensor, found: Tensor) -> float:
    if wanted.numel() == 0:
        return 0.0
    gap = (found.double() - wanted.double()).abs().max().item()
    return 0.0 if gap == 0 else gap / max(wanted.double().abs().max().item(), 1e-30)


def _lines(path: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
