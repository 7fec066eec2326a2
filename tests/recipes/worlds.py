"""Digits with augmentation from three generators and a short last batch in each epoch."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

from launcher import Data, Recipe, main, one_cycle, sgd
from launcher.recipes.digits import read_digits

if TYPE_CHECKING:
    from torch import Tensor, nn


def worlds() -> Recipe:
    """Digits with noise from three generators; an epoch has 4 batches of 62 and one of 2."""
    return Recipe(
        name="worlds",
        model=build_model,
        data=build_data,
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        optimizer=sgd(momentum=0.9, weight_decay=1e-4),
        schedule=one_cycle(),
        batch_size=62,
        lr=0.1,
        lr_batch_size=62,
        epochs=3,
        train_samples=250,
        num_workers=0,
        max_grad_norm=1.0,
        record_samples=True,
    )


def tokens() -> Recipe:
    """Digits with a loss over a different number of items in each sample, zero in some."""
    from dataclasses import replace

    return replace(
        worlds(), name="tokens", loss=masked_loss, metrics={}, count=count_kept, data=build_masked
    )


def paced(*, pause: float = 0.0) -> Recipe:
    """Digits whose steps take at least `pause` seconds, so that a run lasts and computes little."""
    from dataclasses import replace

    def forward(model: Any, batch: Any) -> Any:
        time.sleep(pause)
        return model(batch[0])

    return replace(worlds(), name="paced", forward=forward)


def build_model() -> nn.Module:
    """Return a model from images (N, 1, 8, 8) to logits (N, 10)."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10)
    )


class Noisy:
    """Digits with noise from torch, numpy and random."""

    def __init__(self, start: int, stop: int, noise: float) -> None:
        images, labels = read_digits()
        self.images, self.labels = images[start:stop], labels[start:stop]
        self.noise = noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import numpy as np
        import torch

        image = self.images[index]
        image = image + self.noise * torch.randn(1, 8, 8)
        image = image + self.noise * float(np.random.randn())
        return image + self.noise * random.random(), int(self.labels[index])


def build_data() -> Data:
    """Return 250 training and 70 evaluation digits."""
    return Data(train=Noisy(0, 250, 0.1), evaluation=Noisy(250, 320, 0.0))


class Masked:
    """Digits with a mask of 8 items, of which zero to eight count in each sample."""

    def __init__(self, start: int, stop: int) -> None:
        self.inner = Noisy(start, stop, 0.1)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        import torch

        image, label = self.inner[index]
        mask = torch.arange(8) < torch.randint(0, 9, ()) * (index % 3 != 0)
        return image, label, mask


def build_masked() -> Data:
    """Return 250 training and 70 evaluation digits with masks."""
    return Data(train=Masked(0, 250), evaluation=Masked(250, 320))


def count_kept(batch: tuple[Tensor, Tensor, Tensor]) -> int:
    """Return the number of items that count in a batch."""
    return int(batch[2].sum())


def masked_loss(logits: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies, weighted by the samples' items and summed, and the item count."""
    from torch.nn.functional import cross_entropy

    items = batch[2].sum(1)
    return (cross_entropy(logits, batch[1], reduction="none") * items).sum(), items.sum()


def cross_entropy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the summed cross-entropy and the number of samples."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])


def accuracy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the number of correct predictions and the number of samples."""
    return (logits.argmax(1) == batch[1]).sum(), len(batch[1])


if __name__ == "__main__":
    main(worlds)
