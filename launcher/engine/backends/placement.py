"""Copies of batches to the device of a rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from launcher.engine.backends.nested_tensors import (
    holds_tensors,
    map_tensors,
    tensors_in,
    walk_tensors,
)
from launcher.errors import RecipeError
from launcher.printable import kind_of, printable_line, shortened

_CONTAINED = "tensors in a list, tuple, dict or dataclass from the data or its collate function"


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
        has_streams = device.type not in ("cpu", "meta")
        self._gpu: Any = torch.get_device_module(device) if has_streams else None
        self._stream = None if self._gpu is None else self._gpu.Stream(device)
        self._is_checked = False
        """Whether no tensor was left on the CPU in the first batch, and in all classes of objects
        since."""
        self._left_classes: set[type] = set()
        """Classes of objects that were not moved, because they have no method `to`."""
        # Waiting threads sleep: a busy wait would take a core from the DataLoader workers.
        self._run_ahead = RunAhead(lambda: self._gpu.Event(blocking=True))

    def copy(self, batch: Any) -> Any:
        """Return `batch` with its tensors on the device, and converted.

        Tensors are found in lists, tuples, mappings and dataclasses. Objects of other classes are
        moved by their own method `to`. The first batch, and the first one with an object of a new
        class, are searched for tensors that were left on the CPU.

        Raises:
            RecipeError: A tensor was left on the CPU, or an object cannot be converted.
        """
        if self._device.type == "cpu":
            is_unchanged = not (self._channels_last or self._double)
            return batch if is_unchanged else map_tensors(self._format, batch, self._convert_object)
        device_batch = self._move_all(batch)
        if not self._is_checked:
            check_moved(device_batch, self._device)
            self._is_checked = True
        return device_batch

    def _move_all(self, batch: Any) -> Any:
        if self._stream is None:
            return map_tensors(self._move, batch, self._move_object)
        compute_stream = self._gpu.current_stream(self._device)
        self._run_ahead.limit()
        if any(tensor.device == self._device for tensor in tensors_in(batch)):
            self._stream.wait_stream(compute_stream)  # which may still compute these tensors

        def move_on_compute_stream(value: Any) -> Any:
            # Its tensors are not known to this class, so they are not copied on the copy stream.
            with self._gpu.stream(compute_stream):
                return self._move_object(value)

        with self._gpu.stream(self._stream):
            device_batch = map_tensors(self._move, batch, move_on_compute_stream)
        compute_stream.wait_stream(self._stream)
        # The copy stream allocated this memory. The allocator must not reuse it before the compute
        # stream has finished with it.
        for tensor in tensors_in(device_batch):
            tensor.record_stream(compute_stream)
        return device_batch

    def _move(self, tensor: Tensor) -> Tensor:
        return self._format(tensor.to(self._device, non_blocking=True))

    def _move_object(self, value: Any) -> Any:
        """Return an object of an unknown class on the device, if it has a method `to`.

        The host does not wait for the copy if that method has torch's argument `non_blocking`.
        """
        if callable(getattr(value, "to", None)):
            return self._convert_object(move_object(value, self._device))
        if type(value) not in self._left_classes:
            self._left_classes.add(type(value))
            self._is_checked = False
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
            f"precision=fp64. Return {_CONTAINED}, or use another precision."
        )

    def _format(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if self._double:
            tensor = tensor.double()
        if self._channels_last and tensor.ndim == 4 and not tensor.is_nested:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor


def move_object(value: Any, device: torch.device) -> Any:
    """Return `value.to(device)`, asynchronously where the method `to` can, as tensors do.

    Raises:
        RecipeError: The method returns None.
    """
    options = {"non_blocking": True} if _takes_non_blocking(value.to) else {}
    moved = value.to(device, **options)
    if moved is None:
        raise RecipeError(
            f"A batch holds {kind_of(value)}, whose method to(device) returned None. Let it return "
            "the object with its tensors on the device."
        )
    return moved


def _takes_non_blocking(method: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):  # a function without a signature
        return False
    kinds = {parameter.kind for parameter in parameters.values()}
    return "non_blocking" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def check_moved(batch: Any, device: torch.device) -> None:
    """Check that a batch, moved to a device, has no tensor left on the CPU.

    Objects with their own method `to` may keep tensors there, as PackedSequence does.

    Raises:
        RecipeError: A tensor was left.
    """
    left = next((f for f in walk_tensors(batch, "batch") if f.tensor.device.type == "cpu"), None)
    if left is None:
        return
    path, owner = printable_line(shortened(left.path, 200)), kind_of(left.owner)
    remedy = f"Return {_CONTAINED}"
    if type(left.owner).__module__ != "builtins":
        name = owner.partition(" ")[2]
        remedy += f", or give {name} a method to(device) that returns it with its tensors there"
    raise RecipeError(
        f"{path} is a tensor on the CPU, but the model is on {device.type}, and launcher does not "
        f"move what {owner} holds. {remedy}."
    )


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
