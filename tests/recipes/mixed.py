"""Weights and inputs in several dtypes, which not every strategy computes with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from worlds import worlds

from launcher import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn


def mixed(*, kind: Literal["weights", "inputs"]) -> Recipe:
    """Digits by a model that mixes dtypes.

    Args:
        kind: Whether it trains weights in two dtypes, or gives a norm an input in fp32.
    """
    recipe = replace(worlds(), name="mixed", model=lambda: build(kind), epochs=None, steps=3)
    return replace(recipe, precision="bf16") if kind == "inputs" else recipe


def build(kind: str) -> nn.Module:
    """Return a model from images (N, 1, 8, 8) to logits (N, 10)."""
    import torch
    from torch import nn

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.norm, self.head = (
                nn.Linear(64, 16),
                nn.LayerNorm(16),
                nn.Linear(16, 10),
            )
            if kind == "weights":
                self.hidden.double()

        def forward(self, images: Tensor) -> Tensor:
            inputs = images.flatten(1)
            hidden = self.hidden(inputs.double() if kind == "weights" else inputs)
            logits: Tensor = self.head(self.norm(hidden.to(torch.float32)))
            return logits

    return Mixed()
