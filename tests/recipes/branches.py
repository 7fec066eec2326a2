"""Models that use only parts of themselves in a step: experts, a rare branch, an unused head."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from worlds import worlds

from launcher import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn


def branches() -> Recipe:
    """Digits in batches of 6; one of two experts processes each sample, a rare branch a few."""
    return replace(worlds(), name="branches", model=build_branches, batch_size=6, lr_batch_size=6)


def skipping(*, first: int = 0, swap: bool = False, discard: bool = False) -> Recipe:
    """Digits through three blocks, where rank 1 skips one, swaps two, or discards an output.

    Args:
        first: The number of forward passes before rank 1 deviates.
        swap: Whether rank 1 swaps the last two blocks instead of skipping one.
        discard: Whether rank 1 computes a block but does not use its output.
    """
    return replace(
        worlds(),
        name="skipping",
        model=lambda: build_skipping(first, swap, discard),
        epochs=None,
        steps=40,
    )


def build_branches() -> nn.Module:
    """Return a model from images (N, 1, 8, 8) to logits (N, 10)."""
    import torch
    from torch import nn

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(64, 16)
            self.experts = nn.ModuleDict({"left": nn.Linear(16, 10), "right": nn.Linear(16, 10)})
            self.rare, self.unused = nn.Linear(16, 10), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.trunk(x.flatten(1))
            out: Tensor = hidden.new_zeros(len(x), 10)
            brightness = x.flatten(1)[:, 20]
            left = brightness > brightness.new_tensor(0.5)
            for expert, mask in (("left", left), ("right", ~left)):
                if mask.any():
                    out = torch.where(mask[:, None], self.experts[expert](hidden), out)
            rare = x.flatten(1)[:, 5] > x.new_tensor(0.99)
            if rare.any():
                out = out + torch.where(rare[:, None], self.rare(hidden), out.new_zeros(()))
            return out

    return Branches()


def build_skipping(first: int, swap: bool, discard: bool) -> nn.Module:
    """Return a model from images (N, 1, 8, 8) to logits (N, 10), with blocks that FSDP shards."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.layers(x)
            return out

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.head, self.passes = nn.Linear(64, 10), 0

        def forward(self, x: Tensor) -> Tensor:
            x, blocks = x.flatten(1), list(self.blocks)
            self.passes += 1
            differs = self.training and self.passes > first and os.environ.get("RANK") == "1"
            if differs and not discard:
                blocks[1:] = [blocks[2], blocks[1]] if swap else [blocks[2]]
            for index, block in enumerate(blocks):
                output = block(x)
                x = x if differs and discard and index == 1 else output
            out: Tensor = self.head(x)
            return out

    return Skipping()
