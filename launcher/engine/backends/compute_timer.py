"""Times of a rank's own forward and backward passes, on the clock of its GPU.

With NCCL all ranks wait on their devices for the gradients of the slowest one, so the time of a
whole step is the same on all. The time until that wait begins is the rank's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Variable

_MAX_PENDING = 2048
"""Upper limit on the steps that are timed between two reads; older ones are then forgotten."""


class Event(Protocol):
    """A mark in a queue of a device, such as `torch.cuda.Event(enable_timing=True)`."""

    def record(self, stream: Any) -> None:
        """Queue the mark."""

    def query(self) -> bool:
        """Return whether the device has passed the mark, without waiting for it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from this mark to another one; both have been passed."""


class ComputeTimer:
    """Marks where the passes of each step begin and end on a device, and never waits for it.

    The end is the last kernel of the last backward pass, before the device waits for the gradients
    of other ranks.

    Args:
        make_event: Returns a new event.
        get_stream: Returns the stream of the passes.
    """

    def __init__(self, make_event: Callable[[], Event], get_stream: Callable[[], Any]) -> None:
        self._make_event, self._get_stream = make_event, get_stream
        self._unused: list[Event] = []
        self._pending: deque[tuple[Event, Event]] = deque(maxlen=_MAX_PENDING)
        self._begin: Event | None = None
        self._stream: Any = None
        self._is_last = True

    def begin(self, *, last: bool) -> None:
        """Mark the beginning of a step if this micro-step is its first.

        Args:
            last: Whether this micro-step is the last of its step, so that the next begins another.
        """
        if self._is_last:
            self._stream = self._get_stream()
            self._begin = self._mark()
        self._is_last = last

    def end_with(self, loss: Tensor) -> None:
        """Mark the end of the step when the coming backward pass from `loss` has been queued.

        Autograd calls functions at the end of a pass in the order in which they were queued. This
        one is queued when the pass begins, and DistributedDataParallel's, which waits for the
        gradients of the other ranks, when the last gradient is ready (torch 2.13).
        """
        if self._is_last and self._begin is not None:
            loss.register_hook(self._queue_end)

    def take(self) -> tuple[float, int]:
        """Return (total seconds, number) of the steps that the device has finished since."""
        seconds, num_steps = 0.0, 0
        while self._pending:
            begin, end = self._pending[0]
            if not end.query():
                break
            self._pending.popleft()
            seconds += begin.elapsed_time(end) / 1000
            num_steps += 1
            self._unused += (begin, end)
        return seconds, num_steps

    def _queue_end(self, gradient: Tensor) -> None:
        engine: Any = Variable._execution_engine  # noqa: SLF001
        engine.queue_callback(self._mark_end)

    def _mark_end(self) -> None:
        if self._begin is not None:
            self._pending.append((self._begin, self._mark()))
            self._begin = None

    def _mark(self) -> Event:
        event = self._unused.pop() if self._unused else self._make_event()
        event.record(self._stream)
        return event


def compute_timer(device: torch.device) -> ComputeTimer | None:
    """Return a timer for passes on a GPU; None on a CPU, where the host's own clock tells them."""
    if device.type == "cpu":
        return None
    gpu: Any = torch.get_device_module(device)
    return ComputeTimer(
        lambda: gpu.Event(enable_timing=True),
        lambda: gpu.current_stream(device),
    )
