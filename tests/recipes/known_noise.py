"""A recipe with a known gradient noise scale: the gradient of a sample is the sample itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher import Data, Recipe, constant, main, sgd

if TYPE_CHECKING:
    from torch import Tensor, nn

DIMENSIONS, SPREAD, MEAN = 50, 2.0, 0.16
B_SIMPLE = SPREAD**2 / MEAN**2
"""The gradient noise scale tr(S) / |G|^2; both are sums of DIMENSIONS equal terms."""


def known_noise(*, batch: int = 256) -> Recipe:
    """A linear model with a learning rate so small that its weights hardly change."""
    return Recipe(
        name="known_noise",
        model=build_model,
        data=build_data,
        loss=lambda outputs, batch: (outputs.sum(), len(batch[0])),
        optimizer=sgd(momentum=0.0),
        schedule=constant(),
        batch_size=batch,
        lr=1e-6,
        lr_rule="none",
        epochs=4,
        train_samples=20_000,
        in_memory=True,
    )


def build_model() -> nn.Module:
    """Return a model from (N, DIMENSIONS) to (N, 1)."""
    from torch import nn

    return nn.Linear(DIMENSIONS, 1, bias=False)


def build_data() -> Data:
    """Return 20,000 normally distributed vectors."""
    import torch
    from torch.utils.data import TensorDataset

    normal: Tensor = torch.randn(20_000, DIMENSIONS, generator=torch.Generator().manual_seed(0))
    return Data(train=TensorDataset(normal * SPREAD + MEAN))


if __name__ == "__main__":
    main(known_noise)
