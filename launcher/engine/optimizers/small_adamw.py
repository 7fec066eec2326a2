"""AdamW whose two moments are kept in bfloat16: half the memory of the states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from launcher.engine.optimizers.flat import STEP, FlatOptimizer


class SmallAdamW(FlatOptimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101), computed in float32.

    The states between steps are in the dtype `state_dtype`; bfloat16 is rounded to stochastically.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def update(
        self, group: Mapping[str, Any], weight: Tensor, gradient: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        moment, square = states
        beta1, beta2 = group["betas"]
        moment.mul_(beta1).add_(gradient * (1.0 - beta1))
        square.mul_(beta2).add_(gradient.mul_(gradient).mul_(1.0 - beta2))
        step = group[STEP]
        correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
        scale = square.sqrt().mul_(correction2.rsqrt().to(weight.dtype)).add_(group["eps"])
        weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        weight.sub_(moment.div(scale).mul_((group["lr"] / correction1).to(weight.dtype)))
        return weight, moment, square
