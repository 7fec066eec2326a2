"""SGD with momentum for weights that are kept in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from launcher.engine.optimizers.flat import FlatOptimizer


class SmallSGD(FlatOptimizer):
    """Stochastic gradient descent with momentum, as torch.optim.SGD computes it.

    The momentum is in float32, and the weights are rounded stochastically to their own dtype.
    """

    state_names = ("momentum_buffer",)

    def update(
        self, group: Mapping[str, Any], weight: Tensor, gradient: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        (buffer,) = states
        gradient.add_(weight * group["weight_decay"])
        buffer.mul_(group["momentum"]).add_(gradient)
        change = gradient.add_(buffer * group["momentum"]) if group["nesterov"] else buffer
        return weight.sub_(change * group["lr"]), buffer
