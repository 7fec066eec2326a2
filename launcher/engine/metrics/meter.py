"""What each step measured, kept on the device and read together about twice a second.

Reading a number from a GPU waits for all that it still has to do. So the loop only collects, and
every so many steps all ranks sum what they collected in one all-reduce and read it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launcher.engine.backends.base import Backend
from launcher.engine.metrics.rank_times import CommunicationClock, OwnShare, RankRow, by_rank
from launcher.errors import RecipeError, TrainingError

_SECONDS_BETWEEN_READS = 0.5
_MOST_STEPS_BETWEEN_READS = 1000
_MOST_IDS_SHOWN = 256


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

    time: float
    """When the step ended, in seconds since 1970, by rank 0's clock."""

    lr: float
    momentum: float | None
    """As the optimizer has it; of Adam its first beta. None where it has none."""

    items: int
    """Items of the global batch that the loss counts: samples, or what `Recipe.count` says."""

    grad_norm: float | None
    """Norm of the gradient of the global batch, before clipping; None where it overflowed in fp16,
    and the step was left out."""

    samples_per_second: float
    """Over all ranks, averaged over the steps read together with this one."""

    step_seconds: float
    """What it took, averaged in the same way."""

    data_wait_seconds: float
    """What the ranks waited for data, on average."""

    communication_seconds: float | None
    """What the ranks waited for communication with nothing left to compute, on average over ranks
    and the steps read together with this one; None where that cannot be told (FSDP, ZeRO)."""

    @property
    def is_finite(self) -> bool:
        """Whether the step was taken, or left out for no worse reason than fp16's range."""
        norm = 0.0 if self.grad_norm is None else self.grad_norm
        return math.isfinite(self.loss) and math.isfinite(norm)


class RankFlags(NamedTuple):
    """What ranks tell each other whenever they read: of each, how many say so."""

    stop: float = 0.0
    """Was asked to stop."""

    save: float = 0.0
    """Finds a checkpoint due; rank 0 alone is asked."""

    written: float = 0.0
    """Has written its part of the checkpoint under way."""


@dataclass(frozen=True, kw_only=True)
class MetricsBatch:
    """What the ranks know of the steps since the last reading, the same on each."""

    rows: list[StepRow]
    flags: RankFlags
    ranks: RankRow | None
    """Now and then: every second at first, and less often the more ranks and hours there are."""


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
    momentum: float | None
    grad_norm: Tensor
    data_wait_seconds: float


class Meter:
    """Collects the measurements of steps, and reads them together."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._collected: list[_Collected] = []
        self._reads_at = 1
        self._since = time.perf_counter()
        self._waits = CommunicationClock(backend.communication)
        self._share = OwnShare(backend.world_size)

    def add(self, **measured: Any) -> None:
        """Keep what a step measured; tensors stay on their device."""
        self._collected.append(_Collected(**measured))

    def is_due(self) -> bool:
        """Return whether enough steps are collected; the same on every rank."""
        return len(self._collected) >= self._reads_at

    def restart_clock(self) -> None:
        """Leave the time since the last read out of the throughput: it was not training."""
        self._since = time.perf_counter()

    def read(self, flags: RankFlags, *, ends: bool) -> MetricsBatch:
        """Return a row for each collected step, and the votes of all ranks (collective).

        Args:
            flags: This rank's.
            ends: Whether the training ends here.

        Raises:
            RecipeError: The loss counted other items than the batch holds.
            TrainingError: In fp16 no scale of the loss keeps the gradient finite; or the ranks have
                called different modules, so that the gathered weights were wrong.
        """
        collected, self._collected = self._collected, []
        world_size = self._backend.world_size
        now = time.perf_counter()
        waited = self._waits.per_step()
        waits = sum(step.data_wait_seconds for step in collected)
        self._share.add(len(collected), now - self._since, waits, waited)
        own = self._share.row(self._backend) if self._share.is_due or ends else None
        sums = self._sums(collected, now - self._since, waited, flags, own).tolist()
        items = as_tensor([step.items for step in collected], self._backend.device).tolist()
        self._since = now
        ranks = None if own is None else by_rank(sums[-world_size:], tells=waited is not None)
        sums = sums if own is None else sums[:-world_size]
        self._check_lockstep(*sums.pop()[:2])
        flags, (seconds, ended, communication) = RankFlags(*sums.pop()), sums.pop()
        self._share.pass_by(seconds)
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
        rows: list[StepRow] = []
        each = seconds / max(len(collected), 1)
        measured = zip(collected, sums, items, grad_norms, strict=True)
        for step, (loss_sum, counted, wait), step_items, norm in measured:
            _check_count(step.step, int(counted), int(step_items))
            rows.append(
                StepRow(
                    step=step.step,
                    epoch=step.epoch,
                    samples=step.samples,
                    loss=loss_sum / step_items,
                    time=ended - each * (len(collected) - len(rows) - 1),
                    lr=step.lr,
                    momentum=step.momentum,
                    items=int(step_items),
                    grad_norm=norm if scaler is None or math.isfinite(norm) else None,
                    samples_per_second=rate,
                    step_seconds=each,
                    data_wait_seconds=wait / world_size,
                    communication_seconds=None if waited is None else communication / world_size,
                )
            )
        return MetricsBatch(rows=rows, flags=flags, ranks=ranks)

    def _check_lockstep(self, total: float, squares: float) -> None:
        """Refuse steps in which ranks have called different modules (collective).

        The checksums are equal if and only if the square of their sum is that of their squares,
        times the number of ranks (Cauchy-Schwarz).

        Raises:
            TrainingError: They have.
        """
        backend = self._backend
        if backend.call_order is not None and int(squares) * backend.world_size != int(total) ** 2:
            raise backend.call_order.difference(backend.gather)
        if backend.call_order is not None:
            backend.call_order.forget()

    def _sums(
        self,
        collected: list[_Collected],
        seconds: float,
        waited: float | None,
        flags: RankFlags,
        own: list[float] | None,
    ) -> Tensor:
        """Return, summed over ranks, (loss sum, counted items, data wait) of each step.

        Three rows follow: rank 0's seconds and time, so that all ranks work with one clock, beside
        what they waited for communication; the votes; and the sum and the sum of squares of the
        checksums of what each rank has called. Then, where `own` is given, one of each rank.
        Float64, of shape (steps + 3, 3) or (steps + 3 + ranks, 3).
        """
        device = self._backend.device
        nothing = torch.zeros((), device=device)
        losses = torch.stack(
            [functools.reduce(torch.add, step.loss_sums or [nothing]) for step in collected]
        ).double()
        counted = as_tensor([sum(step.counts) for step in collected], device)
        waits = as_tensor([step.data_wait_seconds for step in collected], device)
        first = self._backend.rank == 0
        clock = [seconds if first else 0.0, time.time() if first else 0.0, waited or 0.0]
        said = [flags.stop, flags.save if first else 0.0, flags.written]
        parts = [torch.stack([losses, counted, waits], dim=1)]
        call_order = self._backend.call_order
        called = 0 if call_order is None else call_order.take_checksum()
        parts.append(as_tensor([*clock, *said, called, called**2, 0.0], device).view(3, 3))
        if own is not None:
            ranks = torch.zeros(self._backend.world_size, 3, dtype=torch.float64, device=device)
            ranks[self._backend.rank] = as_tensor(own, device)
            parts.append(ranks)
        return self._backend.sum(torch.cat(parts))


def as_tensor(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Return `values` as one float64 tensor on the device, without waiting for it."""
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(v, device=device).double() for v in values])
    return torch.tensor(values, dtype=torch.float64, device=device)


class NonFiniteGuard:
    """Keeps count of steps that were left out because their loss or gradient was not finite.

    Args:
        most: As many in a row end the run.
        ids_of: Returns the sample ids of a step, counted from 1.
    """

    def __init__(self, most: int, ids_of: Callable[[int], list[int]]) -> None:
        self._most, self._ids_of = most, ids_of
        self._in_a_row = 0

    def check(self, rows: list[StepRow]) -> list[str]:
        """Return what to say of each bad step among `rows`.

        Raises:
            TrainingError: There were too many in a row; it names the last one and its samples.
        """
        said = []
        for row in rows:
            if row.is_finite:
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            ids = self._ids_of(row.step)
            shown = ", ".join(map(str, ids[:_MOST_IDS_SHOWN]))
            shown += f" and {len(ids) - _MOST_IDS_SHOWN:,} more" if ids[_MOST_IDS_SHOWN:] else ""
            what = (
                f"At step {row.step:,} the loss is {row.loss} and the gradient's norm "
                f"{row.grad_norm}, with learning rate {row.lr:.4g}"
            )
            if self._in_a_row >= self._most:
                before = f", as at the {self._in_a_row - 1} before it" if self._in_a_row > 1 else ""
                raise TrainingError(
                    f"{what}{before} (max_bad_steps={self._most}). The steps were not taken: the "
                    "weights are as they were before. Lower lr, set max_grad_norm, or look at the "
                    f"samples of the step: {shown}."
                )
            said.append(f"{what}: it was left out. Its samples: {shown}.")
        return said


def _check_count(step: int, counted: int, items: int) -> None:
    if max(counted, 1) != items:  # nothing counts in a batch of padding; its loss is 0 / 1
        raise RecipeError(
            f"In step {step} the recipe's loss counted {counted:,} items, and the global "
            f"batch holds {items:,}. A loss over samples returns (sum, len(batch[0])); one over "
            "anything else, such as tokens, needs Recipe(count=...), a function (batch) -> items, "
            "to weigh every micro-batch exactly."
        )
