"""Recipe with slow steps and every kind of state that a resumed run must restore."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher import Data, Recipe, adamw, main
from launcher.recipes.digits import cross_entropy, digits, read_digits

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLES = 200


def steady(*, seconds_per_step: float = 0.03) -> Recipe:
    """Digits with noise, BatchNorm and dropout, in 4 batches of 50 per epoch."""
    return replace(
        digits(),
        name="steady",
        model=build_model,
        data=build_data,
        forward=lambda model, batch: _slow_forward(model, batch, seconds_per_step),
        loss=cross_entropy,
        metrics={},
        optimizer=adamw(weight_decay=0.1),
        lr=0.003,
        batch_size=50,
        lr_batch_size=50,
        epochs=10,
        train_samples=SAMPLES,
        num_workers=1,
        in_memory=False,
        checkpoint_every=1,
        record_samples=True,
    )


def build_model() -> nn.Module:
    """Return a net that maps images (N, 1, 8, 8) to logits (N, 10)."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8 * 64, 10),
    )


class Noisy:
    """Dataset of digits with noise that is drawn anew in each epoch."""

    def __init__(self) -> None:
        images, labels = read_digits()
        self.images, self.labels = images[:SAMPLES], labels[:SAMPLES]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import torch

        image = self.images[index]
        return image + 0.1 * torch.randn(1, 8, 8), int(self.labels[index])


def build_data() -> Data:
    """Return the noisy digits as training data, without a validation set."""
    return Data(train=Noisy())


def _slow_forward(model: nn.Module, batch: tuple[Tensor, Tensor], seconds: float) -> Tensor:
    time.sleep(seconds)
    logits: Tensor = model(batch[0])
    return logits


if __name__ == "__main__":
    main(steady)
