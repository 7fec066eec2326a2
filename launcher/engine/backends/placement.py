"""Moving batches to the device."""

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

_BF16_FROM = (8, 0)
_COMPILE_FROM = (7, 0)
"""The least compute capabilities."""


class Placement:
    """Copies batches to one device.

    On CUDA the copies are issued on a stream of their own: from pinned memory they run while the
    previous micro-batch still computes, and the computing stream waits for them, not the host.

    Args:
        device: Where to.
        channels_last: Whether images, floating tensors (N, C, H, W), lie there as (N, H, W, C).
        double: Whether floating tensors are float64 there.
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
            as_it_is = not (self._channels_last or self._double)
            return batch if as_it_is else tree_map_only(Tensor, self._format, batch)
        with torch.cuda.stream(self._stream):
            moved = tree_map_only(Tensor, self._move, batch)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        # Their memory belongs to the copying stream, and is not to be reused before computing ends.
        tree_map_only(Tensor, lambda tensor: tensor.record_stream(computing), moved)
        return moved

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
    """Return this rank's device, made the current one and set up as the recipe says.

    Raises:
        WorldError: The plan counts on GPUs that torch cannot use, or that cannot do what is asked.
    """
    if plan.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise WorldError(
            f"Planned for GPUs, and torch {torch.__version__} finds none that it can use. A +cpu "
            "build of torch or a driver older than its CUDA has this effect: see `nvidia-smi`. "
            "device=cpu trains on CPUs."
        )
    if local_rank >= torch.cuda.device_count():
        raise WorldError(
            f"Planned for {plan.nproc_per_node} GPUs on this node, and torch finds "
            f"{torch.cuda.device_count()}. Use -n {torch.cuda.device_count()}."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = recipe.tf32
    torch.backends.cudnn.allow_tf32 = recipe.tf32
    torch.backends.cudnn.benchmark = recipe.cudnn_benchmark
    name, generation = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if plan.precision == "bf16" and generation < _BF16_FROM:
        raise WorldError(
            f"precision=bf16 needs a GPU of the Ampere generation or newer, and this is a {name}. "
            "Use precision=fp16, or fp32."
        )
    if recipe.compile and generation < _COMPILE_FROM:
        raise WorldError(
            f"compile=true needs a GPU of the Volta generation or newer, and this is a {name}. "
            "Leave compile out."
        )
    return device


def device_name(device: torch.device) -> str:
    """Return what the device is called, the CPU by its model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"
