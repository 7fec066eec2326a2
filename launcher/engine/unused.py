"""Parameters that a rank does not use in a step, under DistributedDataParallel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UsedParameters:
    """Knows which parameters a backward pass has reached, and completes it for the rest.

    DistributedDataParallel waits for a gradient of every parameter. Where an expert, a head or a
    branch is left out, its parameters get gradients of zeros in a second, tiny backward pass. The
    search of the whole graph in each forward pass, which `find_unused_parameters` makes for the
    same end, is spared, and accumulation needs no exception.

    Args:
        module: The module whose parameters are watched.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [each for each in module.parameters() if each.requires_grad]
        self._reached: set[int] = set()
        for number, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(self._hook(number))

    def _hook(self, number: int) -> object:
        return lambda _: self._reached.add(number)

    def begin(self) -> None:
        """Forget what was reached before."""
        self._reached.clear()

    def complete(self) -> None:
        """Give each parameter that was not reached a gradient of zeros, through autograd."""
        if len(self._reached) == len(self._parameters):
            return
        missing = [
            each for number, each in enumerate(self._parameters) if number not in self._reached
        ]
        frozen = [each for each in missing if not each.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        zeros: list[Tensor] = [torch.zeros_like(each) for each in missing]
        torch.autograd.backward([each.view_as(each) for each in missing], zeros)
        for parameter in frozen:
            parameter.requires_grad_(False)
