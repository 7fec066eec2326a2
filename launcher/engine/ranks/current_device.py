"""The device that a thread works on if a call names none."""

from __future__ import annotations

import torch


def make_current(device: torch.device) -> None:
    """Make a device the current one of this thread, if it is not the CPU.

    A new thread starts with the first device of the machine. Whatever it then does with the current
    device opens that one, which takes some hundred megabytes there in every rank.
    """
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
