"""The device of a rank, and copies of batches to it."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.engine.backends.nested_tensors import holds_tensors, map_tensors, tensors_in
from launcher.errors import RecipeError, WorldError
from launcher.planning.plan import Plan
from launcher.printable import kind_of
from launcher.recipe.recipe import Recipe

_MIN_CAPABILITY_BF16 = (8, 0)
_MIN_CAPABILITY_COMPILE = (7, 0)
"""The lowest CUDA compute capabilities that support each feature."""


_REMEDY = "Return tensors in a list, tuple, dict or dataclass from the data or its collate function"


class Placement:
    """Copies batches to one device.

    On CUDA the copies run on a separate stream. From pinned memory they overlap with the
    computation of the previous micro-batch, and the compute stream waits for them, not the host.

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

        It is copied on the compute stream, because its tensors are not known to this class.

        Raises:
            RecipeError: It holds tensors and has no method `to`.
        """
        if callable(getattr(value, "to", None)):
            with torch.cuda.stream(compute_stream):
                value = value.to(self._device)
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


def planned_device(recipe: Recipe, plan: Plan, local_rank: int) -> torch.device:
    """Return this rank's device, after making it current and applying the recipe's settings.

    Raises:
        WorldError: torch cannot use the planned GPU, or the GPU lacks a feature that the recipe
            requires.
    """
    if plan.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise WorldError(
            f"The plan needs GPUs, but torch {torch.__version__} finds no usable one. Either torch "
            "is a +cpu build, or the driver is older than its CUDA version requires: see "
            "`nvidia-smi`. To train on CPUs, set device=cpu."
        )
    if local_rank >= torch.cuda.device_count():
        raise WorldError(
            f"The plan needs {plan.nproc_per_node} GPUs on this node, but torch finds "
            f"{torch.cuda.device_count()}. Use -n {torch.cuda.device_count()}."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = recipe.tf32
    torch.backends.cudnn.allow_tf32 = recipe.tf32
    torch.backends.cudnn.benchmark = recipe.cudnn_benchmark
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if plan.precision == "bf16" and capability < _MIN_CAPABILITY_BF16:
        raise WorldError(
            f"precision=bf16 needs a GPU of the Ampere generation or newer, but this is a {name}. "
            "Use precision=fp16 or precision=fp32."
        )
    if recipe.compile and capability < _MIN_CAPABILITY_COMPILE:
        raise WorldError(
            f"compile=true needs a GPU of the Volta generation or newer, but this is a {name}. "
            "Use compile=false."
        )
    return device


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the model name of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"
