"""Measuring the gradient noise: norms of the gradients of parts of a batch, beside the step.

What the parts are depends on where a rank sees a gradient of its own. Without sharding, and under
ZeRO, it is there in every backward pass, before it is averaged: each micro-batch is a part. FSDP
sums over the ranks in every backward pass: the first micro-batches of all ranks are one part, of
which there have to be two or more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from launcher.engine.backends.base import Backend
from launcher.finders.noise import Measurement
from launcher.recipe import Recipe

STRIDE = 20
"""In a run one step in so many is measured, so that it costs next to nothing."""


_ROUNDING = 1e-6


class Noise(Protocol):
    """Is called by the loop as it goes, on every rank alike."""

    def begin(self, step: int) -> None:
        """Take note that `step`, from 0, begins."""

    def took(self, weight: float | Tensor, count: int | Tensor) -> None:
        """Take note of a backward pass of `weight` times a loss over `count` items, 0 for none."""

    def end(self, step: int, items: int | Tensor, grad_norm: Tensor) -> None:
        """Take note that the step has been taken, on a batch of `items`."""

    def read(self) -> list[Measurement]:
        """Return what has been measured since the last time (collective)."""


class Unmeasured:
    """Measures nothing."""

    def begin(self, step: int) -> None:
        """Nothing begins."""

    def took(self, weight: float | Tensor, count: int | Tensor) -> None:
        """Nothing is kept."""

    def end(self, step: int, items: int | Tensor, grad_norm: Tensor) -> None:
        """Nothing ends."""

    def read(self) -> list[Measurement]:
        return []


class _NoiseMeter(ABC):
    """Measures, part by part.

    Args:
        backend: This rank among the others.
        model: What is trained.
        stride: One step in so many is measured.
    """

    def __init__(self, backend: Backend, model: nn.Module, stride: int) -> None:
        self._backend, self._stride = backend, stride
        self._trained = [each for each in model.parameters() if each.requires_grad]
        self._measures = False
        self._parts: list[Tensor] = []
        """(sum of |g|^2 over parts, sum of 1 / items, number of parts) of this step."""

        self._steps: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def begin(self, step: int) -> None:
        self._measures = step % self._stride == 0
        if self._measures:
            self._begin()

    def took(self, weight: float | Tensor, count: int | Tensor) -> None:
        if self._measures:
            scaler = self._backend.scaler
            self._took(weight if scaler is None else weight * scaler.factor, count)

    def end(self, step: int, items: int | Tensor, grad_norm: Tensor) -> None:
        if not self._measures:
            return
        self._end()
        device = self._backend.device
        parts = torch.stack(self._parts).sum(0) if self._parts else self._row(0.0, 0.0, 0.0)
        self._parts = []
        self._steps.append((step, parts, torch.as_tensor(items, device=device), grad_norm))

    def read(self) -> list[Measurement]:
        if not self._steps:
            return []
        steps, self._steps = self._steps, []
        sums = self._backend.sum(torch.stack([parts for _, parts, _, _ in steps])).tolist()
        found = []
        for (step, _, items, norm), (squares, inverses, parts) in zip(steps, sums, strict=True):
            # The last batch of an epoch may be so short that it is one part.
            if parts and inverses / parts * float(items) > 1 + _ROUNDING:
                measurement = Measurement(
                    step=step + 1,
                    small=squares / parts,
                    small_inverse=inverses / parts,
                    big=float(norm) ** 2,
                    big_items=float(items),
                )
                found.append(measurement)
        return found

    def _row(self, squares: float | Tensor, inverses: float | Tensor, parts: float) -> Tensor:
        values = (squares, inverses, parts)
        device = self._backend.device
        return torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
        )

    @abstractmethod
    def _begin(self) -> None:
        """Begin to look at gradients."""

    @abstractmethod
    def _took(self, weight: float | Tensor, count: int | Tensor) -> None:
        """Keep the norm of one micro-batch's gradient, if it is a part."""

    @abstractmethod
    def _end(self) -> None:
        """Look no more."""


class OwnNoise(_NoiseMeter):
    """Looks at the gradient of each micro-batch as autograd hands it to the weights."""

    _hooks: list[RemovableHandle]
    _norms: list[Tensor]

    def _begin(self) -> None:
        self._norms = []
        # For this step alone: a hook takes a while even when it does nothing.
        self._hooks = [each.register_hook(self._look) for each in self._trained]

    def _look(self, grad: Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(grad, dtype=torch.float32))

    def _took(self, weight: float | Tensor, count: int | Tensor) -> None:
        norms, self._norms = self._norms, []
        if not norms or (isinstance(count, int) and count == 0):
            return
        squares = torch.stack(norms).double().square().sum() / (weight * count) ** 2
        self._parts.append(self._row(squares, 1 / count, 1.0))

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()


class SummedNoise(_NoiseMeter):
    """Looks at what the ranks have summed after the first micro-batch of each (FSDP)."""

    def _begin(self) -> None:
        self._micro_batches = 0

    def _took(self, weight: float | Tensor, count: int | Tensor) -> None:
        self._micro_batches += 1
        if self._micro_batches > 1:
            return
        backend = self._backend
        counted = torch.as_tensor(count, dtype=torch.float64, device=backend.device)
        counted = backend.sum(counted.clone())
        norm = backend.norm([each.grad for each in self._trained if each.grad is not None])
        # It is a mean over ranks of sums with this weight.
        squares = (norm.double() * backend.world_size / (weight * counted)).square()
        if backend.rank == 0:
            self._parts.append(self._row(squares, 1 / counted, 1.0))

    def _end(self) -> None:
        """Nothing was put in the way."""


def noise_of(recipe: Recipe, backend: Backend, model: nn.Module, stride: int) -> Noise:
    """Return what measures the noise under the plan's strategy, if the recipe asks for it."""
    if not recipe.noise_scale:
        return Unmeasured()
    kind = SummedNoise if backend.plan.backend == "fsdp" else OwnNoise
    return kind(backend, backend.unwrap(model), stride)
