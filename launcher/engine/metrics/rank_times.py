"""Time, waiting and memory of each rank, which show the rank that the others wait for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.engine.backends.base import Backend
from launcher.engine.ranks.processes import peak_bytes

_RANK_ROWS_PER_SECOND = 64
"""Upper limit on the rank measurements written per second, for any number of ranks."""

ROW_WIDTH = 4
"""Numbers that each rank contributes to a `RankRow`."""

_INTERVAL_FRACTION = 0.01
"""Interval between two exchanges as a fraction of the training time so far."""


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """Measurements by rank in metrics.jsonl, over the steps since the last such row."""

    own_seconds: list[float] | None
    """Seconds per step of each rank, without its communication wait. The others wait for the rank
    with the largest value. None where the communication wait cannot be measured."""

    device_seconds: list[float] | None = None
    """Seconds per step of each rank's forward and backward passes on its GPU, before it waits for
    the gradients of other ranks. None on CPUs, under FSDP and ZeRO, and with sync_batchnorm=true,
    where passes wait for other ranks in between."""

    data_wait_seconds: list[float]
    """Seconds per step that each rank waits for data."""

    memory_bytes: list[int]
    """Peak memory of each rank: GPU memory on a GPU, host memory otherwise."""


class CommunicationClock:
    """Converts the running total of communication wait into a wait per step.

    Args:
        get_totals: Returns (seconds, number of timed steps) since the start; None where they cannot
            be measured.
    """

    def __init__(self, get_totals: Callable[[], tuple[float, int] | None]) -> None:
        self._get_totals = get_totals
        self._last_totals = 0.0, 0
        self._last_mean = 0.0

    def per_step(self) -> float | None:
        """Return the mean seconds per step since the last call.

        If no step was timed since, the previous mean is returned.
        """
        totals = self._get_totals()
        if totals is None:
            return None
        seconds, steps = totals[0] - self._last_totals[0], totals[1] - self._last_totals[1]
        if steps > 0:
            self._last_mean, self._last_totals = max(seconds / steps, 0.0), totals
        return self._last_mean


class RankTotals:
    """Accumulates the time of this rank, and schedules its exchange with all ranks.

    Args:
        world_size: Number of ranks.
    """

    def __init__(self, world_size: int) -> None:
        self._min_interval = max(1.0, world_size / _RANK_ROWS_PER_SECOND)
        self._clock, self._due = 0.0, self._min_interval
        self._num_steps, self._own_seconds, self._data_wait = 0, 0.0, 0.0
        self._device_seconds, self._num_timed = 0.0, 0

    @property
    def is_due(self) -> bool:
        """Whether an exchange is due; the same on every rank."""
        return self._clock >= self._due

    def advance_clock(self, seconds: float) -> None:
        """Advance the clock of the schedule by `seconds`, which must be equal on all ranks."""
        self._clock += seconds

    def add(
        self, num_steps: int, seconds: float, data_wait: float, wait_per_step: float | None
    ) -> None:
        """Add steps to the totals.

        Args:
            num_steps: Number of steps.
            seconds: Duration of all these steps.
            data_wait: Seconds spent waiting for data in all these steps.
            wait_per_step: Mean communication wait of a step, in seconds; None if not measured.
        """
        self._num_steps += num_steps
        self._own_seconds += seconds - num_steps * (wait_per_step or 0.0)
        self._data_wait += data_wait

    def add_device_times(self, seconds: float, num_steps: int) -> None:
        """Add the duration of this rank's own passes on its GPU in some steps."""
        self._device_seconds += seconds
        self._num_timed += num_steps

    def row(self, backend: Backend) -> list[float]:
        """Return this rank's `ROW_WIDTH` measurements, and reset.

        They are the own seconds per step, the data wait per step, the peak bytes, and the seconds
        per step of its passes on the GPU, which are 0 if they are not measured.
        """
        num_steps = max(self._num_steps, 1)
        row = [
            max(self._own_seconds, 0.0) / num_steps,
            self._data_wait / num_steps,
            float(peak_bytes(backend.device)),
            self._device_seconds / max(self._num_timed, 1),
        ]
        self._num_steps, self._own_seconds, self._data_wait = 0, 0.0, 0.0
        self._device_seconds, self._num_timed = 0.0, 0
        self._due = self._clock + max(self._min_interval, _INTERVAL_FRACTION * self._clock)
        return row


def combine_rank_rows(
    rows: list[list[float]], *, measures_waits: bool, measures_devices: bool = False
) -> RankRow:
    """Combine the rows of all ranks into one.

    Args:
        rows: What `RankTotals.row` returned on each rank, in the order of ranks.
        measures_waits: Whether the ranks measure their communication wait.
        measures_devices: Whether the ranks measure their passes on the GPU.
    """
    own_seconds, data_waits, memory, device_seconds = zip(*rows, strict=True)
    return RankRow(
        own_seconds=list(own_seconds) if measures_waits else None,
        device_seconds=list(device_seconds) if measures_devices else None,
        data_wait_seconds=list(data_waits),
        memory_bytes=[int(num_bytes) for num_bytes in memory],
    )
