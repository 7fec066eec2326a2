"""Weights that a callback clips after each step, and an optimizer that asks weights for groups."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from worlds import build_model, worlds

from launcher import CallbackContext, Recipe

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

LIMIT = 0.1


class Clip:
    """Clips all weights, as the critic of a Wasserstein GAN does."""

    def after_step(self, context: CallbackContext) -> None:
        """Clip them in place."""
        for weight in context.model.parameters():
            weight.detach().clamp_(-LIMIT, LIMIT)


def clipped() -> Recipe:
    """Digits with clipped weights."""
    return replace(worlds(), name="clipped", model=build_marked, callbacks=(Clip(),))


def build_marked() -> nn.Module:
    """Return the model of `worlds`, whose biases have an attribute that says how they learn."""
    model = build_model()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.lr_scale = 3.0  # type: ignore[attr-defined]
    return model


def make_scaled_sgd(model: nn.Module, lr: float) -> Optimizer:
    """Return SGD with a learning rate for each weight."""
    from torch.optim import SGD

    groups = [
        {"params": [weight], "lr": lr * getattr(weight, "lr_scale", 1.0)}
        for weight in model.parameters()
    ]
    return SGD(groups, lr=lr, momentum=0.9)
