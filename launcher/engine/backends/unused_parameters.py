"""Zero gradients for parameters that a rank does not use in a step (DistributedDataParallel)."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional


class UsedParameters:
    """Records which parameters a backward pass reaches, and completes the pass for the others.

    DistributedDataParallel waits for a gradient of every parameter. When a rank skips an expert, a
    head or a branch, a second, tiny backward pass gives its parameters gradients of zeros. Unlike
    `find_unused_parameters`, this does not search the whole graph in every forward pass, and it
    works with gradient accumulation.

    Args:
        module: The module whose parameters are watched. No parameter may have a gradient when a
            step begins.
        sparse: The parameters whose gradients are sparse: weights of embeddings.
    """

    def __init__(self, module: nn.Module, sparse: Collection[nn.Parameter] = ()) -> None:
        self._sparse = sparse
        self._parameters = [
            parameter for parameter in module.parameters() if parameter.requires_grad
        ]
        self._reached: set[int] | None = None
        """Indices of the parameters that the last backward pass reached. None until a step
        accumulates: without accumulation, an unreached parameter has no gradient, so hooks are
        unnecessary."""

    def begin(self, *, accumulates: bool) -> None:
        """Begin a micro-step, before its forward pass.

        Args:
            accumulates: Whether more micro-steps follow in the same step.
        """
        if accumulates and self._reached is None:
            for index, parameter in enumerate(self._parameters):
                parameter.register_post_accumulate_grad_hook(self._make_hook(index))
            self._reached = set()
        elif self._reached:
            self._reached.clear()

    def _make_hook(self, index: int) -> Callable[[Tensor], None]:
        def record_reached(_: Tensor) -> None:
            assert self._reached is not None
            self._reached.add(index)

        return record_reached

    def complete(self) -> None:
        """Give each unreached parameter a gradient of zeros, through autograd.

        Those that a callback has frozen lose it again, so that the optimizer leaves them alone.
        """
        if self._reached is None:
            unreached = [parameter for parameter in self._parameters if parameter.grad is None]
        else:
            numbered = enumerate(self._parameters)
            unreached = [parameter for index, parameter in numbered if index not in self._reached]
        if not unreached:
            return
        frozen = [parameter for parameter in unreached if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        used = [self._use(parameter) for parameter in unreached]
        zeros: list[Tensor] = [torch.zeros_like(tensor) for tensor in used]
        torch.autograd.backward(used, zeros)
        for parameter in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _use(self, parameter: nn.Parameter) -> Tensor:
        """Return a tensor of which `parameter` gets a gradient, sparse if its others are."""
        if parameter not in self._sparse:
            return parameter.view_as(parameter)
        no_rows = torch.empty(0, dtype=torch.int64, device=parameter.device)
        return functional.embedding(no_rows, parameter, sparse=True)

    def clear(self) -> None:
        """Clear the gradients of all parameters, including those outside the optimizer."""
        for parameter in self._parameters:
            parameter.grad = None
