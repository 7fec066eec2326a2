"""Digits through a frozen layer, with weights that do not divide evenly among ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from worlds import worlds

from launcher import CallbackContext, Recipe, adamw, main, sgd

if TYPE_CHECKING:
    from torch import nn


class FreezesFirstLayer:
    """Freezes the first weights after two steps, and lets them train again after four."""

    def before_step(self, context: CallbackContext) -> None:
        first = next(context.model.parameters())
        first.requires_grad_(context.step not in (2, 3))


def partly_frozen() -> Recipe:
    """Digits through a frozen layer of 64 x 13 and trained ones of 13 x 7 and 7 x 10."""
    return replace(
        worlds(), name="partly_frozen", model=build_model, optimizer=adamw(), lr=0.003, epochs=1
    )


def frozen_for_a_while() -> Recipe:
    """Digits with momentum and weight decay, and a callback that freezes weights for two steps."""
    optimizer = sgd(momentum=0.9, weight_decay=0.01)
    return replace(worlds(), name="frozen", optimizer=optimizer, callbacks=(FreezesFirstLayer(),))


def build_model() -> nn.Module:
    """Return a model from images (N, 1, 8, 8) to logits (N, 10)."""
    from torch import nn

    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 13), nn.Tanh(), nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 10)
    )
    model[1].requires_grad_(False)
    return model


if __name__ == "__main__":
    main(partly_frozen)
