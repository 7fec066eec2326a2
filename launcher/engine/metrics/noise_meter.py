"""Measuring the gradient noise: norms of the gradients of parts of a batch, beside the step.

What the parts are depends on where a rank sees a gradient of its own. Without sharding, and under
ZeRO, it is there in every backward pass, before it is averaged: each micro-batch is a part. FSDP
sums over the ranks in every backward pass: the first micro-batches of all ranks are one part, of
which there have to be two or more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from launcher.analysis.gradient_noise import Measurement
from launcher.engine.backends.base import Backend
from launcher.engine.metrics.meter import as_tensor
from launcher.planning.strategy import STRATEGIES
from launcher.recipe.recipe import Recipe

STRIDE = 20
"""In a run one step in so many is measured, so that it costs next to nothing."""

_ROUNDING = 1e-6
"""Of 1 / items, summed over ranks: what is beyond it has more than one part."""


class NoiseMeter(Protocol):
    """Is called by the loop as it goes, on every rank alike."""

    def begin(self, step: int) -> None:
        """Take note that `step`, from 0, begins."""

    def add_micro_batch(self, weight: float | Tensor, count: int | Tensor) -> None:
        """Take note of a backward pass of `weight` times a loss over `count` items, 0 for none."""

    def end(self, step: int, items: int | Tensor, grad_norm: Tensor) -> None:
        """Take note that the step has been taken, on a batch of `items`."""

    def read(self) -> list[Measurement]:
        """Return what has been measured since the last time (collective)."""


class NullNoiseMeter:
    """Measures nothing."""

    def begin(self, step: int) -> None:
        """Nothing begins."""

    def add_micro_batch(self, weight: float | Tensor, count: int | Tensor) -> None:
        """Nothing is kept."""

    def end(self, step: int, items: int | Tensor, grad_norm: Tensor) -> None:
        """Nothing ends."""

    def read(self) -> list[Measurement]:
        return []


@dataclass(frozen=True)
class _Part:
    """The gradient of a part of a batch, as it was found."""

    measured: int
    """The place of its step among those measured."""

    norms: list[Tensor]
    """Of its pieces, each of one weight or of all."""

    weight: float | Tensor
    """What the sum over its items was multiplied with."""

    count: int | Tensor
    """Its items."""


class _PartsNoiseMeter(ABC):
    """Measures, part by part; numbers stay on their device until they are read.

    Args:
        backend: This rank among the others.
        model: What is trained.
        stride: One step in so many is measured.
    """

    def __init__(self, backend: Backend, model: nn.Module, stride: int) -> None:
        self._backend, self._stride = backend, stride
        self._trained = [each for each in model.parameters() if each.requires_grad]
        self._measures = False
        self._parts: list[_Part] = []
        self._steps: list[tuple[int, int | Tensor, Tensor]] = []
        """Step, items and norm of the gradient of the whole batch."""

    def begin(self, step: int) -> None:
        self._measures = step % self._stride == 0
        if self._measures:
            self._begin()

    def add_micro_batch(self, weight: float | Tensor, count: int | Tensor) -> None:
        if self._measures:
            scaler = self._backend.scaler
            self._add_micro_batch(weight if scaler is None else weight * scaler.factor, count)

    def end(self, step: int, items: int | Tensor, grad_norm: Tensor) -> None:
        if self._measures:
            self._end()
            self._steps.append((step, items, grad_norm))

    def read(self) -> list[Measurement]:
        if not self._steps:
            return []
        steps, self._steps = self._steps, []
        sums = self._backend.sum(self._sums(len(steps))).tolist()
        found = []
        for (step, items, norm), (squares, inverses, parts) in zip(steps, sums, strict=True):
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

    def _sums(self, num_steps: int) -> Tensor:
        """Return (sum of |g|^2 over parts, sum of 1 / items, parts) of each step, (steps, 3)."""
        parts, self._parts = self._parts, []
        device = self._backend.device
        sums = torch.zeros(num_steps, 3, dtype=torch.float64, device=device)
        if not parts:
            return sums
        norms = torch.stack([norm for part in parts for norm in part.norms]).double()
        owner = [number for number, part in enumerate(parts) for _ in part.norms]
        squares = torch.zeros(len(parts), dtype=torch.float64, device=device)
        squares.index_add_(0, torch.tensor(owner, device=device), norms.square())
        counts = as_tensor([part.count for part in parts], device)
        weights = as_tensor([part.weight for part in parts], device)
        rows = torch.stack(
            [squares / (weights * counts).square(), 1 / counts, torch.ones_like(counts)], dim=1
        )
        measured = torch.tensor([part.measured for part in parts], device=device)
        return sums.index_add_(0, measured, rows)

    def _keep(self, norms: list[Tensor], weight: float | Tensor, count: int | Tensor) -> None:
        self._parts.append(_Part(len(self._steps), norms, weight, count))

    @abstractmethod
    def _begin(self) -> None:
        """Begin to look at gradients."""

    @abstractmethod
    def _add_micro_batch(self, weight: float | Tensor, count: int | Tensor) -> None:
        """Keep the norm of one micro-batch's gradient, if it is a part."""

    @abstractmethod
    def _end(self) -> None:
        """Look no more."""


class LocalNoiseMeter(_PartsNoiseMeter):
    """Looks at the gradient of each micro-batch as autograd hands it to the weights."""

    _hooks: list[RemovableHandle]
    _norms: list[Tensor]

    def _begin(self) -> None:
        self._norms = []
        # For this step alone: a hook takes a while even when it does nothing.
        self._hooks = [each.register_hook(self._add_gradient) for each in self._trained]

    def _add_gradient(self, grad: Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(grad, dtype=torch.float32))

    def _add_micro_batch(self, weight: float | Tensor, count: int | Tensor) -> None:
        norms, self._norms = self._norms, []
        if norms and not (isinstance(count, int) and count == 0):
            self._keep(norms, weight, count)

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()


class ReducedNoiseMeter(_PartsNoiseMeter):
    """Looks at what the ranks have summed after the first micro-batch of each (FSDP)."""

    def _begin(self) -> None:
        self._micro_batches = 0

    def _add_micro_batch(self, weight: float | Tensor, count: int | Tensor) -> None:
        self._micro_batches += 1
        if self._micro_batches > 1:
            return
        backend = self._backend
        counted = backend.sum(as_tensor([count], backend.device))[0]
        norm = backend.norm([each.grad for each in self._trained if each.grad is not None])
        if backend.rank == 0:
            # It is a mean over ranks of sums with this weight.
            self._keep([norm], weight / backend.world_size, counted)

    def _end(self) -> None:
        """Nothing was put in the way."""


def make_noise_meter(recipe: Recipe, backend: Backend, model: nn.Module, stride: int) -> NoiseMeter:
    """Return what measures the noise under the plan's strategy, if the recipe asks for it."""
    if not recipe.noise_scale:
        return NullNoiseMeter()
    summed = STRATEGIES[backend.plan.strategy].sums_gradients_over_ranks_in_backward
    kind = ReducedNoiseMeter if summed else LocalNoiseMeter
    return kind(backend, backend.unwrap(model), stride)
