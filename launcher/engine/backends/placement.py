"""The device of a rank, and copies of batches to it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from launcher.errors import WorldError
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe

_MIN_CAPABILITY_BF16 = (8, 0)
_MIN_CAPABILITY_COMPILE = (7, 0)
"""The lowest CUDA compute capabilities that support each feature."""


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
        """Return `batch`, nested lists, tuples and dicts, with its tensors on the device."""
        if self._stream is None:
            is_unchanged = not (self._channels_last or self._double)
            return batch if is_unchanged else tree_map_only(Tensor, self._format, batch)
        with torch.cuda.stream(self._stream):
            device_batch = tree_map_only(Tensor, self._move, batch)
        compute_stream = torch.cuda.current_stream(self._device)
        compute_stream.wait_stream(self._stream)
        # The copy stream allocated this memory. The allocator must not reuse it before the compute
        # stream has finished with it.
        tree_map_only(Tensor, lambda tensor: tensor.record_stream(compute_stream), device_batch)
        return device_batch

    def _move(self, tensor: Tensor) -> Tensor:
        return self._format(tensor.to(self._device, non_blocking=True))

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
