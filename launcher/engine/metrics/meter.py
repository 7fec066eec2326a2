"""Measurements of each step, kept on the device and read together about twice a second.

Reading a number from a GPU waits for all work queued on it. The loop therefore only collects, and
every few steps all ranks sum their measurements in one all-reduce and read the result.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from launcher.engine.backends.base import Backend
from launcher.engine.backends.transfers import upload
from launcher.engine.metrics.logged_numbers import LoggedNumbers
from launcher.engine.metrics.rank_times import (
    ROW_WIDTH,
    CommunicationClock,
    RankRow,
    RankTotals,
    combine_rank_rows,
)
from launcher.engine.metrics.step_measurements import (
    MicroBatchLoss,
    StepMeasurements,
    TurnMeasurements,
)
from launcher.errors import RecipeError, TrainingError
from launcher.planning.virtual_ranks import virtual_rank_of
from launcher.runs.step_row import ObjectiveRow, ObjectivesRow, StepRow

_SECONDS_BETWEEN_READS = 0.5
_MAX_STEPS_BETWEEN_READS = 1000


class RankFlags(NamedTuple):
    """Flags that ranks exchange at every read.

    On one rank each is 0 or 1; summed over ranks, each is the number of ranks that set it.
    """

    stop: float = 0.0
    """The rank was asked to stop."""

    save: float = 0.0
    """A checkpoint is due by the clock; only the flag of rank 0 counts."""

    written: float = 0.0
    """The rank has written its shard of the pending checkpoint."""


@dataclass(frozen=True, kw_only=True)
class MetricsBatch:
    """Measurements of the steps since the last read, equal on every rank."""

    rows: list[StepRow]
    flags: RankFlags
    ranks: RankRow | None
    """Measurements by rank. They are exchanged every second at first, and less often the more ranks
    there are and the longer the run lasts; None in between."""


class Meter:
    """Collects the measurements of steps and reads many steps at once.

    A GPU may be many steps behind the host that queues its work. The meter therefore takes the time
    after it has waited for the device, so that the time between two reads is that of the device.

    Args:
        backend: This rank among the others.
        clock: Returns the time in seconds.
    """

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.perf_counter) -> None:
        self._backend, self._clock = backend, clock
        self._steps: list[StepMeasurements] = []
        self._num_steps_to_read = 1
        self._clock_start = clock()
        self._communication = CommunicationClock(backend.communication)
        self._rank_totals = RankTotals(backend.world_size)
        self.logged = LoggedNumbers(backend)
        """Receives what the recipe logs in the current step."""

        backend.compute_times()  # those of the trial do not count

    def add(self, step: StepMeasurements) -> None:
        """Keep the measurements of a step, whose tensors stay on their device."""
        self._steps.append(step)

    def is_due(self) -> bool:
        """Return whether enough steps are collected; the answer is the same on every rank."""
        return len(self._steps) >= self._num_steps_to_read

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude what happens in the context from the throughput, because it is not training."""
        began = self._clock()
        yield
        self._clock_start += self._clock() - began

    def read(self, flags: RankFlags, *, is_last: bool) -> MetricsBatch:
        """Return a row for each collected step, and the flags of all ranks (collective).

        Args:
            flags: The flags of this rank.
            is_last: Whether training ends with these steps.

        Raises:
            RecipeError: The loss counted a different number of items than the batch holds.
            TrainingError: In fp16, no loss scale keeps the gradient finite; or the ranks called
                different modules, so the gathered weights were wrong.
        """
        steps, self._steps = self._steps, []
        turns = [turn for step in steps for turn in step.turns]
        measured = [*(step.main for step in steps), *turns]
        grad_norms = self._backend.read(torch.stack([each.grad_norm for each in measured]))
        now = self._clock()  # the device has done all work of these steps
        seconds, self._clock_start = now - self._clock_start, now
        wait_per_step = self._communication.per_step()
        data_wait = sum(step.data_wait_seconds for step in steps)
        self._rank_totals.add(len(steps), seconds, data_wait, wait_per_step)
        device_times = self._backend.compute_times()
        if device_times is not None:
            self._rank_totals.add_device_times(*device_times)
        rank_row = None
        if self._rank_totals.is_due or is_last:
            rank_row = self._rank_totals.row(self._backend)
        sums = self._backend.read(
            self._sum_over_ranks(steps, measured, seconds, wait_per_step, flags, rank_row)
        )
        if self._backend.plan.exact:
            exact_losses = self._sum_exactly([each.losses for each in measured])
            sums[: len(measured)] = [
                [loss, *others] for loss, (_, *others) in zip(exact_losses, sums, strict=False)
            ]
        items = self._backend.read(upload([step.items for step in steps], self._backend.device))
        ranks = None
        if rank_row is not None:
            world_size = self._backend.world_size
            num_rows = _rows_of_three(world_size * ROW_WIDTH)
            numbers = itertools.chain.from_iterable(sums[-num_rows:])
            ranks = combine_rank_rows(
                [list(itertools.islice(numbers, ROW_WIDTH)) for _ in range(world_size)],
                measures_waits=wait_per_step is not None,
                measures_devices=device_times is not None,
            )
            sums = sums[:-num_rows]
        logged_sums, sums = sums[len(measured) + 3 :], sums[: len(measured) + 3]
        *checksums, num_with_new_names = sums.pop()
        self._check_lockstep(*checksums)
        summed_flags = RankFlags(*sums.pop())
        seconds, end_time, total_wait = sums.pop()
        self._rank_totals.advance_clock(seconds)
        self._num_steps_to_read = min(
            max(int(_SECONDS_BETWEEN_READS * len(steps) / max(seconds, 1e-9)), 1),
            _MAX_STEPS_BETWEEN_READS,
        )
        self._check_loss_scale()
        logged = self.logged.means(
            [step.logged for step in steps], logged_sums, any_new=num_with_new_names > 0
        )
        rows = self._make_rows(
            steps,
            sums,
            items,
            grad_norms,
            logged,
            seconds=seconds,
            end_time=end_time,
            total_wait=None if wait_per_step is None else total_wait,
        )
        return MetricsBatch(rows=rows, flags=summed_flags, ranks=ranks)

    def _sum_over_ranks(
        self,
        steps: list[StepMeasurements],
        measured: list[TurnMeasurements],
        seconds: float,
        wait_per_step: float | None,
        flags: RankFlags,
        rank_row: list[float] | None,
    ) -> Tensor:
        """Return the measurements of all ranks summed in one all-reduce (collective).

        The rows are (loss sum, counted items, data wait) for each step, (loss sum, counted items,
        0) for each turn of an objective, of which `measured` has the losses, followed by (seconds
        and end time of rank 0, so that all ranks use one clock, and communication wait), the flags,
        and (sum, sum of squares) of the ranks' call checksums with the number of ranks that have
        logged new names. Rows of logged numbers follow. If `rank_row` is given, the rows of all
        ranks follow, in lines of three numbers.

        Returns:
            A float64 tensor of shape (steps + turns + 3, 3), or with more rows.
        """
        device = self._backend.device
        zero = torch.zeros((), device=device)
        losses = torch.stack(
            [
                functools.reduce(torch.add, [loss.total for loss in turn.losses] or [zero])
                for turn in measured
            ]
        ).double()
        counts = upload([sum(loss.num_items for loss in turn.losses) for turn in measured], device)
        waits = [step.data_wait_seconds for step in steps]
        data_waits = upload([*waits, *[0.0] * (len(measured) - len(steps))], device)
        if not self._backend.leads_group:  # the first rank of its group counts the same samples
            losses, counts = torch.zeros_like(losses), torch.zeros_like(counts)
        is_first = self._backend.rank == 0
        clock = [
            seconds if is_first else 0.0,
            time.time() if is_first else 0.0,
            wait_per_step or 0.0,
        ]
        own_flags = [flags.stop, flags.save if is_first else 0.0, flags.written]
        parts = [torch.stack([losses, counts, data_waits], dim=1)]
        call_order = self._backend.call_order
        checksum = 0 if call_order is None else call_order.take_checksum()
        checks = checksum, checksum**2, float(self.logged.has_new)
        parts.append(upload([*clock, *own_flags, *checks], device).view(3, 3))
        parts.append(self.logged.packed([step.logged for step in steps]))
        if rank_row is not None:
            numbers = [0.0] * (3 * _rows_of_three(self._backend.world_size * ROW_WIDTH))
            first = self._backend.rank * ROW_WIDTH
            numbers[first : first + ROW_WIDTH] = rank_row
            parts.append(upload(numbers, device).view(-1, 3))
        return self._backend.sum(torch.cat(parts))

    def _sum_exactly(self, losses: list[list[MicroBatchLoss]]) -> list[float]:
        """Return the sum of all losses of each, equal to the bit on any number of ranks.

        The call is collective.

        The ranks exchange the sum of each virtual rank, which they add with one rounding.
        """
        backend = self._backend
        count = backend.plan.distribution.count
        table = torch.zeros(len(losses), count, dtype=torch.float64, device=backend.device)
        for row, each in zip(table, losses, strict=True):
            for loss in each:
                row[virtual_rank_of(loss.part)] += loss.total
        return [math.fsum(values) for values in backend.read(backend.sum_samples(table))]

    def _check_lockstep(self, total: float, squares: float) -> None:
        """Refuse steps in which the ranks called different modules (collective).

        The checksums of n ranks are equal if and only if the square of their sum is n times the
        sum of their squares (Cauchy-Schwarz).

        Raises:
            TrainingError: The ranks called different modules.
        """
        backend = self._backend
        if backend.call_order is not None and int(squares) * backend.world_size != int(total) ** 2:
            raise backend.call_order.difference_error(backend.gather)
        if backend.call_order is not None:
            backend.call_order.clear()

    def _check_loss_scale(self) -> None:
        """Refuse to continue in fp16 if the gradient overflows at the smallest loss scale.

        Raises:
            TrainingError: It does.
        """
        for scaler in self._backend.scalers:
            scale = self._backend.read(scaler.scale)
            if scaler.is_exhausted(scale):
                raise TrainingError(
                    f"In fp16 the gradient overflows even with loss scale {scale:g}, so the run "
                    "cannot recover. Use precision=bf16 if the device supports it, or "
                    "precision=fp32."
                )

    def _make_rows(
        self,
        steps: list[StepMeasurements],
        sums: list[list[float]],
        items: list[float],
        grad_norms: list[float],
        logged: list[dict[str, float]],
        *,
        seconds: float,
        end_time: float,
        total_wait: float | None,
    ) -> list[StepRow]:
        """Return one row for each step.

        Args:
            steps: The measurements of this rank.
            sums: (loss sum, counted items, data wait) of each step and then of each turn, summed
                over ranks.
            items: Items of the global batch of each step.
            grad_norms: Norm of the global gradient of each step, and then of each turn.
            logged: What the recipe has logged in each step, over all ranks.
            seconds: Duration of all steps together.
            end_time: End of the last step, in seconds since 1970.
            total_wait: Communication wait per step, summed over ranks; None if not measured.

        Raises:
            RecipeError: The loss counted a different number of items than the batch holds.
        """
        world_size = self._backend.world_size
        has_scaler = self._backend.scaler is not None
        throughput = sum(step.window.size for step in steps) / max(seconds, 1e-9)
        step_seconds = seconds / max(len(steps), 1)
        rows: list[StepRow] = []
        # Those of the turns follow.
        measurements = zip(steps, sums, items, grad_norms, logged, strict=False)
        for step, (loss_sum, counted, data_wait), step_items, grad_norm, own in measurements:
            _check_count(step.step, int(counted), int(step_items))
            rows.append(
                StepRow(
                    step=step.step,
                    epoch=step.window.epoch + 1,
                    samples=step.samples,
                    loss=loss_sum / step_items,
                    time=end_time - step_seconds * (len(steps) - len(rows) - 1),
                    lr=step.main.lr,
                    momentum=step.main.momentum,
                    items=int(step_items),
                    grad_norm=None if has_scaler and not math.isfinite(grad_norm) else grad_norm,
                    samples_per_second=throughput,
                    step_seconds=step_seconds,
                    data_wait_seconds=data_wait / world_size,
                    communication_seconds=None if total_wait is None else total_wait / world_size,
                    logged=own,
                )
            )
        if len(sums) > len(steps):
            of_turns = zip(sums[len(steps) :], grad_norms[len(steps) :], strict=True)
            return [
                self._add_turns(row, step.turns, of_turns)
                for row, step in zip(rows, steps, strict=True)
            ]
        return rows

    def _add_turns(
        self,
        row: StepRow,
        turns: Sequence[TurnMeasurements],
        measured: Iterator[tuple[list[float], float]],
    ) -> ObjectivesRow:
        """Return the row of a step with the turns that it consists of.

        Args:
            row: The row without them.
            turns: The measurements of this rank.
            measured: Yields for each turn its (loss sum, counted items, 0), summed over ranks, and
                the norm of its gradient.

        Raises:
            RecipeError: A loss counted a different number of items than the batch holds.
        """
        objectives: dict[str, ObjectiveRow] = {}
        for turn in turns:
            (loss_sum, counted, _), grad_norm = next(measured)
            _check_count(row.step, int(counted), row.items, turn.name)
            is_overflow = self._backend.scaler is not None and not math.isfinite(grad_norm)
            objectives[turn.name] = ObjectiveRow(
                loss=loss_sum / row.items,
                lr=turn.lr,
                grad_norm=None if is_overflow else grad_norm,
            )
        return ObjectivesRow(**msgspec.structs.asdict(row), objectives=objectives)


def _rows_of_three(num_numbers: int) -> int:
    """Return how many rows of three numbers hold so many numbers."""
    return -(-num_numbers // 3)


def _check_count(step: int, counted: int, items: int, objective: str = "") -> None:
    # The count of a batch of padding is 0, and its loss is divided by 1.
    if max(counted, 1) != items:
        whose = f"the loss of the objective {objective}" if objective else "the recipe's loss"
        raise RecipeError(
            f"In step {step} {whose} counted {counted:,} items, but the global "
            f"batch holds {items:,}. A loss over samples returns (sum, len(batch[0])). A loss over "
            "anything else, such as tokens, needs Recipe(count=...), a function (batch) -> items, "
            "to weight every micro-batch exactly."
        )
