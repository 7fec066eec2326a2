"""Optimizers that scale their steps by the norms of weights, with tensors or with numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from worlds import worlds

from launcher import Recipe

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def scaling(*, reads_numbers: bool = False) -> Recipe:
    """Digits by layer-wise adaptive rates.

    Args:
        reads_numbers: Whether the optimizer reads norms as numbers.
    """

    def make(model: nn.Module, lr: float) -> Optimizer:
        return make_scaling(model, lr, reads_numbers=reads_numbers)

    return replace(worlds(), name="scaling", optimizer=make, epochs=None, steps=4)


def make_scaling(model: nn.Module, lr: float, *, reads_numbers: bool) -> Optimizer:
    """Return an optimizer whose steps are as long as the weights that it updates."""
    import torch

    class LayerWise(torch.optim.Optimizer):
        def __init__(self, weights: Any) -> None:
            super().__init__(weights, {"lr": lr})

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for weight in group["params"]:
                    length = weight.norm().item() if reads_numbers else weight.norm()
                    scale = length / (weight.grad.norm() + 1)
                    weight.sub_(group["lr"] * scale * weight.grad)

    return LayerWise(model.parameters())
