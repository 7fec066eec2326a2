"""The clock of the steps where the host runs ahead of the device."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from measured_steps import measured_step
from torch import Tensor

from launcher.engine.backends.local import LocalBackend
from launcher.engine.metrics.meter import Meter, RankFlags
from launcher.engine.metrics.step_measurements import MicroBatchLoss
from launcher.environment.machine import read_machine
from launcher.recipe.resolve import resolve
from launcher.recipes.digits import digits
from launcher.runs.plan_recipe import plan_recipe
from launcher.runs.step_row import StepRow


class SimulatedDevice(LocalBackend):
    """A device with a queue of work, and the clock of the host that waits for it.

    The host queues work in no time of its own, and only reading a tensor waits for the device.
    """

    def __init__(self) -> None:
        _, plan = plan_recipe(resolve("digits"), (), read_machine(), nproc_per_node=1)
        super().__init__(digits(), plan)
        self.host_seconds = 100.0
        self._idle_at = 0.0
        """When the device has done all work in its queue."""

    def queue(self, seconds: float) -> None:
        """Queue work that takes the device some seconds."""
        self._idle_at = max(self._idle_at, self.host_seconds) + seconds

    def read(self, values: Tensor) -> Any:
        self.host_seconds = max(self.host_seconds, self._idle_at)
        return super().read(values)


def take_steps(device: SimulatedDevice, meter: Meter, num_steps: int) -> list[StepRow]:
    """Return the rows of steps that take the host 10 ms and the device 200 ms each."""
    rows = []
    for step in range(1, num_steps + 1):
        device.host_seconds += 0.01
        device.queue(0.2)
        meter.add(measured_step(step, losses=[MicroBatchLoss(torch.tensor(64.0), 64, None)]))
        if meter.is_due() or step == num_steps:
            rows += meter.read(RankFlags(), is_last=step == num_steps).rows
    return rows


def test_steps_take_the_time_of_the_device() -> None:
    """A step lasts as long as on the device, however far the host runs ahead, without a gap."""
    device = SimulatedDevice()
    began = device.host_seconds
    rows = take_steps(device, Meter(device, clock=lambda: device.host_seconds), 50)
    assert len(rows) == 50
    assert all(row.step_seconds == pytest.approx(0.2, abs=0.011) for row in rows)
    assert all(row.samples_per_second == pytest.approx(320, rel=0.06) for row in rows)
    assert sum(row.step_seconds for row in rows) == pytest.approx(device.host_seconds - began)


def test_reads_are_half_a_second_apart_on_the_device() -> None:
    """The number of steps between two reads follows the time of the device, not of the host."""
    device = SimulatedDevice()
    meter = Meter(device, clock=lambda: device.host_seconds)
    moments = []
    read = meter.read

    def read_at(*arguments: Any, **options: Any) -> Any:
        batch = read(*arguments, **options)
        moments.append(device.host_seconds)
        return batch

    meter.read = read_at  # type: ignore[method-assign]
    take_steps(device, meter, 60)
    regular = moments[2:-1]  # the last read comes at the end of the training
    gaps = [later - earlier for earlier, later in itertools.pairwise(regular)]
    assert len(gaps) > 20
    assert all(0.3 <= gap <= 0.7 for gap in gaps)


def test_an_evaluation_does_not_count_as_training() -> None:
    """The time in `paused` is missing from the next row, and only that time."""
    device = SimulatedDevice()
    meter = Meter(device, clock=lambda: device.host_seconds)
    take_steps(device, meter, 2)
    with meter.paused():
        device.host_seconds += 30.0
    device.host_seconds += 0.5  # work of the host between two steps counts
    (first, *_) = take_steps(device, meter, 1)
    assert first.step_seconds == pytest.approx(0.71)
