"""A recipe with BatchNorm over samples that have one value per channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher import Data, Recipe, constant

if TYPE_CHECKING:
    from torch import Tensor, nn


def normed(*, samples: int) -> Recipe:
    """A classifier with BatchNorm, trained on `samples` random vectors in batches of 16."""
    return Recipe(
        name="normed",
        model=_model,
        data=lambda: _data(samples),
        loss=_loss,
        batch_size=16,
        lr=0.1,
        lr_batch_size=16,
        epochs=1,
        schedule=constant(),
        in_memory=True,
        train_samples=samples,
        device="cpu",
    )


def _model() -> nn.Module:
    from torch import nn

    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def _data(samples: int) -> Data:
    import torch
    from torch.utils.data import TensorDataset

    return Data(train=TensorDataset(torch.randn(samples, 8), torch.randint(3, (samples,))))


def _loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    from torch.nn.functional import cross_entropy

    return cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])
