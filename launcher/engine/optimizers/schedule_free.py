"""Schedule-free AdamW: an average of the weights in place of a decaying learning rate.

Defazio et al., "The Road Less Scheduled" (arXiv:2405.15682). Training computes gradients at a point
between the average and the weights that AdamW moves. Evaluations, and the final weights, are of the
average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from launcher.engine.optimizers.flat import STEP, FlatOptimizer, local_of

_SUM, _LARGEST = "weight_sum", "lr_max"


class ScheduleFreeAdamW(FlatOptimizer):
    """Schedule-free AdamW, computed in float32.

    The model holds the points at which gradients are computed. `eval` replaces them by the average,
    and `train` puts back the same bits, so that an evaluation changes no step.
    """

    state_names = ("z", "exp_avg_sq")
    scalar_names = (_SUM, _LARGEST)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._points: dict[Tensor, Tensor] = {}

    def initial_states(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        states = super().initial_states(weight, dtype)
        torch._foreach_copy_([local_of(states["z"])], [local_of(weight.detach())])
        return states

    def advance(self, group: Mapping[str, Any], scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        largest = scalars[_LARGEST].clamp(min=group["lr"])
        return {_SUM: scalars[_SUM] + largest**2, _LARGEST: largest}

    def update(
        self, group: Mapping[str, Any], weight: Tensor, gradient: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        z, square = states
        beta1, beta2, lr = group["beta1"], group["beta2"], group["lr"]
        square.mul_(beta2).add_((gradient * gradient).mul_(1.0 - beta2))
        correction = 1.0 - beta2 ** group[STEP]
        scale = square.sqrt().mul_(correction.rsqrt().to(weight.dtype)).add_(group["eps"])
        direction = gradient.div_(scale).add_(weight * group["weight_decay"])
        share = group[_LARGEST] ** 2 / group[_SUM]
        weight.add_((z - weight).mul_(share.to(weight.dtype)))
        rate = lr * (beta1 * (1.0 - share) - 1.0)
        weight.add_(direction * rate.to(weight.dtype))
        return weight, z.sub_(direction.mul_(lr)), square

    @torch.no_grad()
    def eval(self) -> None:
        """Replace the weights by their averages; call `train` before the next step."""
        for group in self.param_groups:
            for weight in group["params"]:
                if not self.state[weight]:
                    continue
                local, z = local_of(weight.detach()), local_of(self.state[weight]["z"])
                self._points[weight] = local.clone()
                away = (z - local.to(z.dtype)).mul_(1.0 - 1.0 / group["beta1"])
                local.copy_(away.add_(local))

    @torch.no_grad()
    def train(self) -> None:
        """Put back the weights with which training goes on."""
        for weight, point in self._points.items():
            local_of(weight.detach()).copy_(point)
        self._points.clear()
