"""Digits with a model that initialises its weights in many ways."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from worlds import worlds

from launcher import Recipe, adamw, main

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH, HIDDEN, DEPTH = 10, 7, 3
"""Sizes that two ranks do not share evenly."""


def tower(*, reads: bool = False) -> Recipe:
    """Digits with a tower of blocks.

    Args:
        reads: Whether the model function reads a random number, so that it cannot be recorded.
    """
    return replace(
        worlds(), name="tower", model=lambda: build_tower(reads=reads), optimizer=adamw(), lr=0.01
    )


def build_tower(*, reads: bool = False) -> nn.Module:
    """Return a model from images (N, 1, 8, 8) to logits (N, 10)."""
    import torch
    from torch import nn

    class Block(nn.Module):
        """Two layers, of which the second shares its weight with the first."""

        def __init__(self, drop: float) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.one, self.two = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
            self.back = nn.Linear(WIDTH, HIDDEN)
            self.back.weight = self.one.weight
            self.drop = drop

        def forward(self, x: Tensor) -> Tensor:
            y = self.back(x) * self.one(self.norm(x)).relu()
            out: Tensor = x + (1.0 - self.drop) * self.two(y)
            return out

    class Tower(nn.Module):
        """Blocks on embedded rows of pixels."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, WIDTH)
            self.positions = nn.Embedding(8, WIDTH, padding_idx=0)
            drops = [x.item() for x in torch.linspace(0, 0.1, DEPTH)]
            self.blocks = nn.ModuleList(Block(drop) for drop in drops)
            self.head = nn.Linear(WIDTH, 10, bias=False)
            self.scale = nn.Parameter(torch.tensor([0.5, 1.5]))
            self.register_buffer("places", torch.arange(8), persistent=False)
            self.register_buffer("offset", torch.randn(WIDTH) / 100)
            self.shift = torch.rand(1)
            self.apply(self._initialise)
            nn.init.orthogonal_(self.head.weight)
            block: Any
            for number, block in enumerate(self.blocks):
                block.two.weight.data.div_((2 * (number + 1)) ** 0.5)
            self.shift += float(torch.rand(())) * 0 if reads else 0

        def _initialise(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = (
                self.embed(x[:, 0]) * self.scale[0] + self.positions(self.places) * self.scale[1]
            )
            block: Any
            for block in self.blocks:
                y = block(y)
            shift = self.get_buffer("offset")
            out: Tensor = self.head(y.mean(1) + shift + self.shift.to(y.device))
            return out

    return Tower()


if __name__ == "__main__":
    main(tower)
