"""Numbers that go from the host to a device without making the host wait for the device.

torch copies ordinary host memory to a GPU synchronously: the host waits until all work that was
queued before is done, and the GPU then waits for the host to queue more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Return numbers as one tensor on a device.

    Args:
        values: Numbers, or scalar tensors, on the device or not.
        device: The device.

    Returns:
        A float64 tensor of shape (len(values),).
    """
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([upload_scalar(value, device) for value in values])
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers if device.type == "cpu" else upload_tensor(numbers, device)


def upload_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """Return a number, or a scalar tensor, as a float64 tensor of shape () on a device."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)


def upload_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of ordinary host memory on a device.

    The copy starts from pinned memory, which torch reuses only after the copy.
    """
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
