"""Measure the gradient noise from norms of the gradients of parts of a batch, beside the step.

A part is the smallest piece of the batch of which a gradient is available. Without sharding, and
under ZeRO, the gradient of each micro-batch is available in the backward pass, before it is
averaged over ranks: each micro-batch is a part. FSDP reduces over ranks in every backward pass: the
first micro-batches of all ranks form one part, so a step needs at least two micro-batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from launcher.analysis.gradient_noise import Measurement
from launcher.engine.backends.base import Backend
from launcher.engine.backends.transfers import upload, upload_tensor
from launcher.engine.state.parameter_kinds import norm_of
from launcher.planning.strategy import STRATEGIES
from launcher.planning.virtual_ranks import Part
from launcher.recipe.recipe import Recipe

if TYPE_CHECKING:
    from launcher.engine.backends.exact_fsdp import ExactFSDPBackend

STRIDE = 20
"""A run measures one step in this many, which makes the cost negligible."""

_ROUNDING = 1e-6
"""Relative tolerance for mean(1 / part items) x batch items; a larger value means several parts."""


class NoiseMeter(Protocol):
    """Measures the gradient noise; the loop calls it at the same points on every rank."""

    def begin(self, step: int) -> None:
        """Prepare for `step`, counted from 0."""

    def add_micro_batch(
        self, weight: float | Tensor, count: int | Tensor, part: Part | None = None
    ) -> None:
        """Record a backward pass of `weight` times a loss over `count` items, 0 for padding."""

    def end(self, step: int, items: int | Tensor, grad_norm: Tensor) -> None:
        """Record the gradient norm of the step, whose global batch holds `items` items."""

    def read(self) -> list[Measurement]:
        """Return the measurements since the last call (collective)."""


class NullNoiseMeter:
    """A noise meter that measures nothing, for runs that do not ask for the noise scale."""

    def begin(self, step: int) -> None:
        """Do nothing."""

    def add_micro_batch(
        self, weight: float | Tensor, count: int | Tensor, part: Part | None = None
    ) -> None:
        """Do nothing."""

    def end(self, step: int, items: int | Tensor, grad_norm: Tensor) -> None:
        """Do nothing."""

    def read(self) -> list[Measurement]:
        return []


@dataclass(frozen=True)
class _Part:
    """The gradient of a part of a batch, as autograd left it."""

    step_index: int
    """Index of the step among the measured steps since the last read."""

    norms: list[Tensor]
    """Norms of the pieces of the gradient: one for each parameter, or one for all."""

    weight: float | Tensor
    """Factor by which the sum of the losses was multiplied before the backward pass."""

    count: int | Tensor
    """Number of items in the part."""


class _PartsNoiseMeter(ABC):
    """Measures part by part; numbers stay on their device until they are read.

    Args:
        backend: This rank among the others.
        model: The recipe's own module.
        stride: One step in this many is measured.
    """

    def __init__(self, backend: Backend, model: nn.Module, stride: int) -> None:
        self._backend, self._stride = backend, stride
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._is_measuring = False
        self._parts: list[_Part] = []
        self._steps: list[tuple[int, int | Tensor, Tensor]] = []
        """(step, items, gradient norm) of the whole batch of each measured step."""

    def begin(self, step: int) -> None:
        self._is_measuring = step % self._stride == 0
        if self._is_measuring:
            self._begin()

    def add_micro_batch(
        self, weight: float | Tensor, count: int | Tensor, part: Part | None = None
    ) -> None:
        if self._is_measuring:
            self._add_micro_batch(self._backend.scaled(weight), count, part)

    def end(self, step: int, items: int | Tensor, grad_norm: Tensor) -> None:
        if self._is_measuring:
            self._end()
            self._steps.append((step, items, grad_norm))

    def read(self) -> list[Measurement]:
        if not self._steps:
            return []
        steps, self._steps = self._steps, []
        sums = self._backend.sum(self._sum_parts(len(steps)))
        all_items = upload([items for _, items, _ in steps], sums.device)
        norms = torch.stack([norm for _, _, norm in steps]).to(sums)
        rows = self._backend.read(torch.cat([sums, torch.stack([all_items, norms], dim=1)], dim=1))
        measurements = []
        for (step, _, _), (squares, inverses, parts, items, norm) in zip(steps, rows, strict=True):
            # The last batch of an epoch may be so short that it is one part.
            if parts and inverses / parts * items > 1 + _ROUNDING:
                measurement = Measurement(
                    step=step + 1,
                    small=squares / parts,
                    small_inverse=inverses / parts,
                    big=norm**2,
                    big_items=items,
                )
                measurements.append(measurement)
        return measurements

    def _sum_parts(self, num_steps: int) -> Tensor:
        """Return (sum of |g|^2 over parts, sum of 1 / items, number of parts) of each step.

        Returns:
            A float64 tensor of shape (num_steps, 3) with the parts of this rank.
        """
        parts, self._parts = self._parts, []
        device = self._backend.device
        sums = torch.zeros(num_steps, 3, dtype=torch.float64, device=device)
        if not parts:
            return sums
        norms = torch.stack([norm for part in parts for norm in part.norms])
        norms = norms.to(device, torch.float64, non_blocking=True)  # offloaded gradients are on CPU
        part_indices = [index for index, part in enumerate(parts) for _ in part.norms]
        squares = torch.zeros(len(parts), dtype=torch.float64, device=device)
        squares.index_add_(0, upload_tensor(torch.tensor(part_indices), device), norms.square())
        counts = upload([part.count for part in parts], device)
        weights = upload([part.weight for part in parts], device)
        rows = torch.stack(
            [squares / (weights * counts).square(), 1 / counts, torch.ones_like(counts)], dim=1
        )
        step_indices = torch.tensor([part.step_index for part in parts])
        return sums.index_add_(0, upload_tensor(step_indices, device), rows)

    def _add_part(self, norms: list[Tensor], weight: float | Tensor, count: int | Tensor) -> None:
        self._parts.append(_Part(len(self._steps), norms, weight, count))

    @abstractmethod
    def _begin(self) -> None:
        """Start to observe gradients."""

    @abstractmethod
    def _add_micro_batch(
        self, weight: float | Tensor, count: int | Tensor, part: Part | None
    ) -> None:
        """Record the gradient norm of one micro-batch, if it is a part."""

    @abstractmethod
    def _end(self) -> None:
        """Stop observing gradients."""


class LocalNoiseMeter(_PartsNoiseMeter):
    """Measures the gradient of each micro-batch as autograd accumulates it into the parameters."""

    _hooks: list[RemovableHandle]
    _norms: list[Tensor]

    def _begin(self) -> None:
        self._norms = []
        # Registered for this step alone: even a hook that does nothing takes time.
        self._hooks = [parameter.register_hook(self._add_gradient) for parameter in self._trained]

    def _add_gradient(self, grad: Tensor) -> None:
        self._norms.append(norm_of(grad))

    def _add_micro_batch(
        self, weight: float | Tensor, count: int | Tensor, part: Part | None
    ) -> None:
        norms, self._norms = self._norms, []
        if norms and not (isinstance(count, int) and count == 0):
            self._add_part(norms, weight, count)

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()


class ReducedNoiseMeter(_PartsNoiseMeter):
    """Measures the gradient that the ranks have reduced after their first micro-batches (FSDP)."""

    def _begin(self) -> None:
        self._num_micro_batches = 0

    def _add_micro_batch(
        self, weight: float | Tensor, count: int | Tensor, part: Part | None
    ) -> None:
        self._num_micro_batches += 1
        if self._num_micro_batches > 1:
            return
        backend = self._backend
        total_count = backend.sum_samples(upload([count], backend.device)).squeeze(0)
        norm = backend.norm(
            [parameter.grad for parameter in self._trained if parameter.grad is not None]
        )
        if backend.rank == 0:
            # The gradient is the sum over ranks, multiplied by `weight` and divided.
            self._add_part([norm], weight / backend.divisor, total_count)

    def _end(self) -> None:
        """Do nothing: no hooks were registered."""


class VirtualRanksNoiseMeter(_PartsNoiseMeter):
    """Measures the gradient of each virtual rank, as the ranks exchange it (exact FSDP).

    Args:
        backend: This rank among the others, which records squares of what the ranks exchange.
        model: The recipe's own module.
        stride: One step in this many is measured.
    """

    def __init__(self, backend: ExactFSDPBackend, model: nn.Module, stride: int) -> None:
        super().__init__(backend, model, stride)
        self._exact_backend = backend
        self._exchanged: list[tuple[int, Tensor, float | Tensor]] = []
        """Index of a measured step, (squares, items) of each virtual rank over all ranks, and the
        weight of the losses."""

    def _begin(self) -> None:
        self._counts: dict[int, list[int | Tensor]] = {}
        self._weight: float | Tensor = 0.0
        self._exact_backend.record_squares()

    def _add_micro_batch(
        self, weight: float | Tensor, count: int | Tensor, part: Part | None
    ) -> None:
        self._weight = weight
        if part is not None and part.virtual_rank is not None:
            self._counts.setdefault(part.virtual_rank, []).append(count)

    def _end(self) -> None:
        backend = self._exact_backend
        squares = backend.take_squares()
        counts = torch.zeros_like(squares)
        for virtual_rank, of_micro_batches in self._counts.items():
            counts[virtual_rank] = sum(of_micro_batches)
        exchanged = backend.sum(torch.stack([squares, counts]))  # no tensor-parallel groups here
        self._exchanged.append((len(self._steps), exchanged, self._weight))

    def _sum_parts(self, num_steps: int) -> Tensor:
        exchanged, self._exchanged = self._exchanged, []
        for step_index, (squares, counts), weight in exchanged:
            is_empty = counts == 0  # fewer samples than virtual ranks, or samples without items
            if self._backend.rank == 0 and not self._backend.read(is_empty.any()):
                self._parts += [
                    _Part(step_index, [square.sqrt()], weight, count)
                    for square, count in zip(squares, counts, strict=True)
                ]
        return super()._sum_parts(num_steps)


def make_noise_meter(recipe: Recipe, backend: Backend, model: nn.Module, stride: int) -> NoiseMeter:
    """Return the noise meter for the plan's strategy, or one that measures nothing.

    Args:
        recipe: What is trained; `noise_scale` decides whether anything is measured.
        backend: This rank among the others.
        model: The module that `Backend.prepare` returned.
        stride: One step in this many is measured.
    """
    if not recipe.noise_scale:
        return NullNoiseMeter()
    summed = STRATEGIES[backend.plan.strategy].sums_gradients_over_ranks_in_backward
    if summed and backend.plan.exact:
        from launcher.engine.backends.exact_fsdp import ExactFSDPBackend

        assert isinstance(backend, ExactFSDPBackend)
        return VirtualRanksNoiseMeter(backend, backend.unwrap(model), stride)
    kind = ReducedNoiseMeter if summed else LocalNoiseMeter
    return kind(backend, backend.unwrap(model), stride)
