"""Parameters that a rank does not use in a step, under DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class UsedParameters:
    """Knows which parameters a backward pass has reached, and completes it for the rest.

    DistributedDataParallel waits for a gradient of every parameter. Where an expert, a head or a
    branch is left out, its parameters get gradients of zeros in a second, tiny backward pass. The
    search of the whole graph in each forward pass, which `find_unused_parameters` makes for the
    same end, is spared, and accumulation needs no exception.

    Args:
        module: The module whose parameters are watched; none has a gradient when a step begins.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [each for each in module.parameters() if each.requires_grad]
        self._reached: set[int] | None = None
        """What the last backward pass has reached, once steps accumulate: before, a parameter that
        was not reached has no gradient, which costs nothing to see."""

    def begin(self, *, accumulates: bool) -> None:
        """Begin a micro-step, before its forward pass.

        Args:
            accumulates: Whether others follow in the same step.
        """
        if accumulates and self._reached is None:
            for number, parameter in enumerate(self._parameters):
                parameter.register_post_accumulate_grad_hook(self._hook(number))
            self._reached = set()
        elif self._reached:
            self._reached.clear()

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def reached(_: Tensor) -> None:
            assert self._reached is not None
            self._reached.add(number)

        return reached

    def complete(self) -> None:
        """Give each parameter that was not reached a gradient of zeros, through autograd."""
        if self._reached is None:
            missing = [each for each in self._parameters if each.grad is None]
        else:
            every = enumerate(self._parameters)
            missing = [each for number, each in every if number not in self._reached]
        if not missing:
            return
        frozen = [each for each in missing if not each.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        zeros: list[Tensor] = [torch.zeros_like(each) for each in missing]
        torch.autograd.backward([each.view_as(each) for each in missing], zeros)
        for parameter in frozen:
            parameter.requires_grad_(False)

    def clear(self) -> None:
        """Clear all gradients, those of parameters that the optimizer leaves alone as well."""
        for parameter in self._parameters:
            parameter.grad = None
