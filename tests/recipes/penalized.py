"""A model of blocks with a penalty on its gradient, on its weights, or on its sensitivity."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from branches import build_skipping
from worlds import cross_entropy, worlds

from launcher import Recipe

if TYPE_CHECKING:
    from torch import Tensor

Penalty = Literal["gradient", "sensitivity", "weights"]


def penalized(*, penalty: Penalty) -> Recipe:
    """Digits with a penalty.

    Args:
        penalty: On the gradient of the outputs, which is differentiated again; on the weights; or a
            factor from that gradient, which is not.
    """

    def forward(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        import torch

        if penalty == "weights":
            norms = [weight.square().sum() for weight in model.parameters()]
            return model(batch[0]), torch.stack(norms).sum().expand(len(batch[1]))
        with torch.enable_grad():
            inputs = batch[0].clone().requires_grad_()
            outputs = model(inputs)
            is_differentiated = penalty == "gradient" and model.training
            (gradient,) = torch.autograd.grad(
                outputs.sum(), inputs, retain_graph=True, create_graph=is_differentiated
            )
        return outputs, gradient.square().sum((1, 2, 3))

    return replace(
        worlds(),
        name="penalized",
        model=lambda: build_skipping(sys.maxsize, False, False),
        forward=forward,
        loss=loss,
        metrics={},
        epochs=None,
        steps=3,
    )


def loss(outputs: tuple[Tensor, Tensor], batch: Any) -> tuple[Tensor, int]:
    """Return the summed cross-entropy with the penalty, and the number of samples."""
    total, count = cross_entropy(outputs[0], batch)
    return total + 0.01 * outputs[1].sum(), count
