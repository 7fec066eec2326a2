"""Copies of batches to the device of a rank."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from launcher.engine.backends.nested_tensors import holds_tensors, map_tensors, tensors_in
from launcher.errors import RecipeError
from launcher.printable import kind_of

_REMEDY = "Return tensors in a list, tuple, dict or dataclass from the data or its collate function"


class Placement:
    """Copies batches to one device.

    On CUDA the copies run on a separate stream. From pinned memory they overlap with the
    computation of the previous micro-batch, and the compute stream waits for them, not the host.
    The host runs one micro-batch ahead of the device and no further, so that the memory that is in
    use does not depend on which of them is faster.

    Args:
        device: The target device.
        channels_last: Whether to store images, floating-point tensors of shape (N, C, H, W), in
            the memory format (N, H, W, C).
        double: Whether to convert floating-point tensors to float64.
    """

    def __init__(
        self, device: torch.device, *, channels_last: bool = False, double: bool = False
    ) -> None:
        self._device = device
        self._channels_last = channels_last
        self._double = double
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Waiting threads sleep: a busy wait would take a core from the DataLoader workers.
        self._run_ahead = RunAhead(functools.partial(torch.cuda.Event, blocking=True))

    def copy(self, batch: Any) -> Any:
        """Return `batch` with its tensors on the device, and converted.

        Tensors are found in lists, tuples, mappings and dataclasses. Objects of other classes are
        moved by their own method `to`.

        Raises:
            RecipeError: An object holds tensors that cannot be moved or converted.
        """
        if self._stream is None:
            is_unchanged = not (self._channels_last or self._double)
            return batch if is_unchanged else map_tensors(self._format, batch, self._convert_object)
        compute_stream = torch.cuda.current_stream(self._device)
        self._run_ahead.limit()
        if any(tensor.device == self._device for tensor in tensors_in(batch)):
            self._stream.wait_stream(compute_stream)  # which may still compute these tensors
        move_object = functools.partial(self._move_object, compute_stream)
        with torch.cuda.stream(self._stream):
            device_batch = map_tensors(self._move, batch, move_object)
        compute_stream.wait_stream(self._stream)
        # The copy stream allocated this memory. The allocator must not reuse it before the compute
        # stream has finished with it.
        for tensor in tensors_in(device_batch):
            tensor.record_stream(compute_stream)
        return device_batch

    def _move(self, tensor: Tensor) -> Tensor:
        return self._format(tensor.to(self._device, non_blocking=True))

    def _move_object(self, compute_stream: torch.cuda.Stream, value: Any) -> Any:
        """Return an object of an unknown class on the device.

        It is copied on the compute stream, because its tensors are not known to this class. The
        host does not wait for the copy if its method `to` has torch's argument `non_blocking`.

        Raises:
            RecipeError: It holds tensors and has no method `to`.
        """
        if callable(getattr(value, "to", None)):
            with torch.cuda.stream(compute_stream):
                value = move_object(value, self._device)
        elif holds_tensors(value):
            raise RecipeError(
                f"A batch holds {kind_of(value)}, whose tensors cannot be moved to a GPU. "
                f"{_REMEDY}, or give {type(value).__name__} a method to(device)."
            )
        return self._convert_object(value)

    def _convert_object(self, value: Any) -> Any:
        """Return an object of an unknown class with float64 tensors, if those are needed.

        Raises:
            RecipeError: It holds tensors and cannot be converted.
        """
        if not self._double or not holds_tensors(value):
            return value
        if callable(getattr(value, "double", None)):
            return value.double()
        raise RecipeError(
            f"A batch holds {kind_of(value)}, whose tensors cannot be converted for "
            f"precision=fp64. {_REMEDY}, or use another precision."
        )

    def _format(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if self._double:
            tensor = tensor.double()
        if self._channels_last and tensor.ndim == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor


def move_object(value: Any, device: torch.device) -> Any:
    """Return `value.to(device)`, asynchronously where the method `to` can, as tensors do."""
    try:
        parameters = inspect.signature(value.to).parameters
    except (TypeError, ValueError):  # a function without a signature
        return value.to(device)
    kinds = {parameter.kind for parameter in parameters.values()}
    if "non_blocking" in parameters or inspect.Parameter.VAR_KEYWORD in kinds:
        return value.to(device, non_blocking=True)
    return value.to(device)


class RunAhead:
    """Lets the host queue work for one micro-batch more than the device has finished.

    Args:
        make_event: Returns an event of a device, such as `torch.cuda.Event`.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        self._make_event = make_event
        self._previous: Any = None

    def limit(self) -> None:
        """Wait until the device has finished all work that was queued before the last call."""
        event = self._make_event()
        event.record()
        if self._previous is not None:
            self._previous.synchronize()
        self._previous = event
