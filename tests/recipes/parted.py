"""Recipes with virtual ranks and exact sums, for what they allow and what they refuse."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher import Data, Recipe, constant

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


def parted() -> Recipe:
    """A model that draws from three generators for some samples alone; the last batch is short."""
    return Recipe(
        name="parted",
        model=build_drawing,
        data=build_data,
        loss=loss,
        batch_size=12,
        lr=0.1,
        lr_batch_size=12,
        epochs=2,
        schedule=constant(),
        in_memory=True,
        train_samples=50,
        virtual_ranks=4,
        exact=True,
    )


def fused() -> Recipe:
    """The recipe with an optimizer of its own, of fused kernels."""
    return replace(parted(), name="fused", optimizer=make_fused)


def sparse() -> Recipe:
    """The recipe with an embedding whose gradients are sparse."""
    return replace(parted(), name="sparse", model=build_sparse, optimizer=make_plain)


def make_fused(model: nn.Module, lr: float) -> Optimizer:
    """Return torch's AdamW with fused kernels."""
    from torch.optim import AdamW

    return AdamW(model.parameters(), lr=lr, fused=True)


def make_plain(model: nn.Module, lr: float) -> Optimizer:
    """Return torch's SGD, which takes sparse gradients."""
    from torch.optim import SGD

    return SGD(model.parameters(), lr=lr)


def build_drawing() -> nn.Module:
    """Return a model that draws random numbers if the first sample of a micro-batch is positive."""
    import numpy.random
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 3))

        def forward(self, x: Tensor) -> Tensor:
            if self.training and x[0, 0] > 0.8:
                x = x * (random.random() + numpy.random.random() + torch.rand(()))
            outputs: Tensor = self.layers(x)
            return outputs

    return Model()


def build_sparse() -> nn.Module:
    """Return a model of 8 numbers as words, with an embedding whose gradients are sparse."""
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.head(self.words((x.abs() * 3).long() % 9).mean(1))
            return outputs

    return Model()


def build_data() -> Data:
    """Return 50 random samples of 8 numbers."""
    import torch
    from torch.utils.data import TensorDataset

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, 3, (50,), generator=generator)
    return Data(train=TensorDataset(inputs, targets))


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the summed cross-entropy and the number of samples."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])
