"""Times of passes on a device, from marks in its queue that the host never waits for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measured_steps import measured_step
from torch import Tensor

from launcher.engine.backends import devices, exact
from launcher.engine.backends.compute_timer import ComputeTimer, compute_timer
from launcher.engine.backends.exact import ExactLocalBackend
from launcher.engine.backends.local import LocalBackend
from launcher.engine.metrics.meter import Meter, RankFlags
from launcher.engine.metrics.step_measurements import MicroBatchLoss
from launcher.environment.machine import read_machine
from launcher.planning.virtual_ranks import Part
from launcher.recipe.overrides import Override
from launcher.recipe.resolve import resolve
from launcher.recipes.digits import digits
from launcher.runs.plan_recipe import plan_recipe


class Queue:
    """A device that works through a queue, on a clock that the test advances."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._idle_at = 0.0

    def add(self, seconds: float) -> None:
        """Queue work for some seconds."""
        self._idle_at = max(self._idle_at, self.now) + seconds

    def event(self) -> QueueEvent:
        self.num_events += 1
        return QueueEvent(self)

    def mark(self) -> float:
        """Return when the device has done what is in the queue."""
        return max(self._idle_at, self.now)


class QueueEvent:
    """A mark in a `Queue`; it has no method that waits."""

    def __init__(self, queue: Queue) -> None:
        self._queue, self.at = queue, 0.0

    def record(self, stream: Any) -> None:
        assert stream == "stream"
        self.at = self._queue.mark()

    def query(self) -> bool:
        return self._queue.now >= self.at

    def elapsed_time(self, end_event: QueueEvent) -> float:
        assert self.query()
        assert end_event.query(), "torch refuses events that the device has not passed"
        return 1000 * (end_event.at - self.at)


class Pass(torch.autograd.Function):
    """An operation that queues work in its forward and twice as much in its backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, queue: Queue, seconds: float) -> Tensor:
        ctx.queue, ctx.seconds = queue, seconds
        queue.add(seconds)
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.queue.add(2 * ctx.seconds)
        return gradients[0], None, None


class QueueBackend(LocalBackend):
    """A backend whose passes are queued on a simulated device."""

    def __init__(self) -> None:
        _, plan = plan_recipe(resolve("digits"), (), read_machine(), nproc_per_node=1)
        super().__init__(digits(), plan)
        self.queue = Queue()
        self.timer = ComputeTimer(self.queue.event, lambda: "stream")
        self.compute_timer = self.timer
        self._weight = torch.ones((), requires_grad=True)

    def step(self, seconds: float, micro_steps: int = 1) -> None:
        """Take a step whose forward and backward passes take three times `seconds` in all."""
        for number in range(1, micro_steps + 1):
            with self.micro_step(last=number == micro_steps):
                passed: Any = Pass.apply(self._weight, self.queue, seconds)  # type: ignore[no-untyped-call]
                self.backward(passed, 1.0)

    def read(self, values: Tensor) -> Any:
        self.queue.now = self.queue.mark()
        return super().read(values)


def test_passes_are_timed_from_the_first_forward_to_the_last_backward() -> None:
    """All micro-steps of a step count, and what the device does between two steps does not."""
    backend = QueueBackend()
    backend.step(0.1)
    backend.queue.add(5.0)  # the optimizer
    backend.step(0.1, micro_steps=3)
    backend.queue.now = 100.0
    assert backend.compute_times() == pytest.approx((0.3 + 0.9, 2))
    assert backend.compute_times() == (0.0, 0)


def test_a_step_that_the_device_has_not_finished_is_read_later() -> None:
    """Reading takes what is finished, and never asks for the time of the rest or waits for it."""
    backend = QueueBackend()
    for _ in range(3):
        backend.step(1.0)  # 3 s each
    backend.queue.now = 6.5
    assert backend.compute_times() == pytest.approx((6.0, 2))
    backend.queue.now = 9.0
    assert backend.compute_times() == pytest.approx((3.0, 1))


def test_events_are_used_again() -> None:
    """The number of events follows the steps between two reads, not the steps of the run."""
    backend = QueueBackend()
    for _ in range(50):
        backend.step(0.1, micro_steps=2)
        backend.queue.now = backend.queue.mark()
        backend.compute_times()
    assert backend.queue.num_events == 2


def test_a_step_without_a_backward_pass_is_forgotten() -> None:
    """Steps of a trial that end early do not lengthen the step after them."""
    backend = QueueBackend()
    with backend.micro_step(last=True):
        backend.queue.add(7.0)
    backend.step(0.1)
    backend.queue.now = 100.0
    assert backend.compute_times() == pytest.approx((0.3, 1))


def test_the_meter_reports_the_time_of_each_device() -> None:
    """The passes of a rank are a part of its step time, beside its own time of the whole step."""
    backend = QueueBackend()
    backend.step(9.0)  # a trial
    backend.queue.now = backend.queue.mark()
    meter = Meter(backend, clock=lambda: backend.queue.now)
    for step in range(1, 11):
        backend.step(0.1)
        backend.queue.add(0.2)
        meter.add(measured_step(step, losses=[MicroBatchLoss(torch.tensor(64.0), 64, None)]))
    ranks = meter.read(RankFlags(), is_last=True).ranks
    assert ranks is not None
    assert ranks.own_seconds == pytest.approx([0.5])
    assert ranks.device_seconds == pytest.approx([0.3])


def test_exact_sums_are_timed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend with exact sums on one rank begins to time where the others do."""
    monkeypatch.setattr(devices, "use_deterministic_kernels", lambda: None)  # of this process
    monkeypatch.setattr(exact, "keep_freed_memory", lambda: None)
    built, plan = plan_recipe(
        resolve("digits"),
        [
            Override(name="virtual_ranks", value=8, source="test"),
            Override(name="exact", value=True, source="test"),
        ],
        read_machine(),
        nproc_per_node=1,
    )
    backend, queue = ExactLocalBackend(built.recipe, plan), Queue()
    backend.compute_timer = ComputeTimer(queue.event, lambda: "stream")
    weight = torch.ones((), requires_grad=True)
    part = Part(virtual_rank=7, micro_step=0, is_last=True, is_empty=False)
    with backend.micro_step(last=True, part=part):
        passed: Any = Pass.apply(weight, queue, 0.5)  # type: ignore[no-untyped-call]
        backend.backward(passed, 1.0)
    queue.now = 10.0
    assert backend.compute_times() == pytest.approx((1.5, 1))


def test_nothing_is_timed_on_a_cpu() -> None:
    """A CPU has no timer, and reports no time of a device."""
    _, plan = plan_recipe(resolve("digits"), (), read_machine(), nproc_per_node=1)
    backend = LocalBackend(digits(), plan)
    assert compute_timer(torch.device("cpu")) is None
    assert backend.compute_timer is None
    assert backend.compute_times() is None
