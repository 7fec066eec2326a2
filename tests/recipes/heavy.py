"""A recipe that needs about 17 MiB per sample in forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher import Data, Recipe, constant, main, sgd

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH = 1 << 20
"""Elements of each of the four saved activations of a sample: 4 MiB."""


def heavy() -> Recipe:
    """A chain of functions that save their inputs for the backward pass."""
    return Recipe(
        name="heavy",
        model=build_model,
        data=build_data,
        loss=lambda outputs, batch: (outputs.sum(), len(batch[0])),
        optimizer=sgd(momentum=0.0),
        schedule=constant(),
        batch_size=128,
        lr=1e-6,
        lr_rule="none",
        epochs=1,
        train_samples=256,
        in_memory=True,
    )


def build_model() -> nn.Module:
    """Return a model from (N, 1) to (N,)."""
    import torch
    from torch import nn

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, vectors: Tensor) -> Tensor:
            wide = (vectors * self.scale).expand(-1, WIDTH)
            for function in (torch.sin, torch.exp, torch.sigmoid):
                wide = function(wide)
            return wide.mean(1)

    return Chain()


def build_data() -> Data:
    """Return 256 numbers from 0 to 1, of shape (256, 1)."""
    import torch
    from torch.utils.data import TensorDataset

    return Data(train=TensorDataset(torch.linspace(0, 1, 256).unsqueeze(1)))


if __name__ == "__main__":
    main(heavy)
