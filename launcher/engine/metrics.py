"""What each step measured, kept on the device and read together about twice a second.

Reading a number from a GPU waits for all that it still has to do. So the loop only collects, and
every so many steps all ranks sum what they collected in one all-reduce and read it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from launcher.engine.backends.base import Backend
from launcher.errors import RecipeError, TrainingError

_SECONDS_BETWEEN_READS = 0.5
_MOST_STEPS_BETWEEN_READS = 1000


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """What metrics.jsonl says of one optimizer step."""

    step: int
    """Steps done, this one included."""

    epoch: int
    """The epoch it belongs to, from 1."""

    samples: int
    """Samples consumed since the start of the run, this step included."""

    loss: float
    """Mean over the items of the global batch."""

    lr: float
    items: int
    """Items of the global batch that the loss counts: samples, or what `Recipe.count` says."""

    grad_norm: float | None
    """Norm of the gradient of the global batch, before clipping; None where it overflowed in fp16,
    and the step was left out."""

    samples_per_second: float
    """Over all ranks, averaged over the steps read together with this one."""

    data_wait_seconds: float
    """What the ranks waited for data, on average."""


@dataclass(kw_only=True, slots=True)
class _Collected:
    step: int
    epoch: int
    samples: int
    batch_samples: int
    items: int | Tensor
    loss_sums: list[Tensor]
    counts: list[int | Tensor]
    lr: float
    grad_norm: Tensor
    data_wait_seconds: float


class Meter:
    """Collects the measurements of steps, and reads them together."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._collected: list[_Collected] = []
        self._reads_at = 1
        self._since = time.perf_counter()

    def add(self, **measured: Any) -> None:
        """Keep what a step measured; tensors stay on their device."""
        self._collected.append(_Collected(**measured))

    def is_due(self) -> bool:
        """Return whether enough steps are collected; the same on every rank."""
        return len(self._collected) >= self._reads_at

    def restart_clock(self) -> None:
        """Leave the time since the last read out of the throughput: it was not training."""
        self._since = time.perf_counter()

    def read(self) -> list[StepRow]:
        """Return a row for each collected step, the same on every rank (collective).

        Raises:
            RecipeError: The loss counted other items than the batch holds.
            TrainingError: In fp16 no scale of the loss keeps the gradient finite.
        """
        collected, self._collected = self._collected, []
        if not collected:
            return []
        now = time.perf_counter()
        sums = self._sums(collected, now - self._since).tolist()
        items = self._tensor([step.items for step in collected]).tolist()
        self._since = now
        seconds = sums.pop()[0]
        grad_norms = torch.stack([step.grad_norm for step in collected]).tolist()
        self._reads_at = min(
            max(int(_SECONDS_BETWEEN_READS * len(collected) / max(seconds, 1e-9)), 1),
            _MOST_STEPS_BETWEEN_READS,
        )
        rate = sum(step.batch_samples for step in collected) / max(seconds, 1e-9)
        scaler = self._backend.scaler
        if scaler is not None and scaler.is_exhausted:
            raise TrainingError(
                f"In fp16 the gradient overflows even when the loss is scaled by {scaler.scale:g}: "
                "the run cannot recover. Use precision=bf16 where the device has it, or fp32."
            )
        rows = []
        measured = zip(collected, sums, items, grad_norms, strict=True)
        for step, (loss_sum, counted, wait), step_items, norm in measured:
            _check_count(step.step, int(counted), int(step_items))
            rows.append(
                StepRow(
                    step=step.step,
                    epoch=step.epoch,
                    samples=step.samples,
                    loss=loss_sum / step_items,
                    lr=step.lr,
                    items=int(step_items),
                    grad_norm=norm if scaler is None or math.isfinite(norm) else None,
                    samples_per_second=rate,
                    data_wait_seconds=wait / self._backend.world_size,
                )
            )
        return rows

    def _sums(self, collected: list[_Collected], seconds: float) -> Tensor:
        """Return, summed over ranks, (loss sum, counted items, data wait) of each step.

        The last row holds rank 0's seconds, so that all ranks work with one clock. Float64, of
        shape (steps + 1, 3).
        """
        device = self._backend.device
        nothing = torch.zeros((), device=device)
        losses = torch.stack(
            [functools.reduce(torch.add, step.loss_sums or [nothing]) for step in collected]
        ).double()
        counted = self._tensor([sum(step.counts) for step in collected])
        waits = self._tensor([step.data_wait_seconds for step in collected])
        clock = self._tensor([seconds if self._backend.rank == 0 else 0.0, 0.0, 0.0])
        steps = torch.stack([losses, counted, waits], dim=1)
        return self._backend.sum(torch.cat([steps, clock.unsqueeze(0)]))

    def _tensor(self, values: Sequence[float | Tensor]) -> Tensor:
        """Return `values` as one float64 tensor on the device, without waiting for it."""
        device = self._backend.device
        if any(isinstance(value, Tensor) for value in values):
            return torch.stack([torch.as_tensor(v, device=device).double() for v in values])
        return torch.tensor(values, dtype=torch.float64, device=device)


def check_finite(rows: list[StepRow]) -> None:
    """Refuse to go on from a loss or gradient that is not a number.

    Raises:
        TrainingError: It names the first such step.
    """
    for row in rows:
        norm = 0.0 if row.grad_norm is None else row.grad_norm
        if not math.isfinite(row.loss) or not math.isfinite(norm):
            raise TrainingError(
                f"At step {row.step} the loss is {row.loss} and the gradient's norm "
                f"{row.grad_norm}, with learning rate {row.lr:.4g}: the run cannot recover. Lower "
                "lr, set max_grad_norm, or look at the batch with record_samples=true."
            )


def _check_count(step: int, counted: int, items: int) -> None:
    if max(counted, 1) != items:  # nothing counts in a batch of padding; its loss is 0 / 1
        raise RecipeError(
            f"In step {step} the recipe's loss counted {counted:,} items, and the global "
            f"batch holds {items:,}. A loss over samples returns (sum, len(batch[0])); one over "
            "anything else, such as tokens, needs Recipe(count=...), a function (batch) -> items, "
            "to weigh every micro-batch exactly."
        )
