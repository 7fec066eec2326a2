"""Moving batches to the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from launcher.errors import WorldError
from launcher.plan import Plan


class Placement:
    """Copies batches to one device.

    On CUDA the copies are issued on a stream of their own: from pinned memory they run while the
    previous micro-batch still computes, and the computing stream waits for them, not the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, batch: Any) -> Any:
        """Return `batch`, nested lists, tuples and dicts, with its tensors on the device."""
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            moved = tree_map_only(Tensor, self._move, batch)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        # Their memory belongs to the copying stream, and is not to be reused before computing ends.
        tree_map_only(Tensor, lambda tensor: tensor.record_stream(computing), moved)
        return moved

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def planned_device(plan: Plan, local_rank: int) -> torch.device:
    """Return this rank's device and make it the current one.

    Raises:
        WorldError: The plan counts on GPUs that torch cannot use.
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
    return device
