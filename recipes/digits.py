"""Handwritten digits of 8 x 8 pixels: a small convolutional net that trains in seconds on a CPU.

The data are the 1,797 digits in the package scikit-learn (UCI ML hand-written digits). Every fifth
is held out for evaluation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher import Data, Recipe, main, one_cycle, sgd

if TYPE_CHECKING:
    from torch import Tensor, nn


def digits() -> Recipe:
    """Handwritten digits of 8 x 8 pixels: a small conv net that trains in seconds on a CPU."""
    return Recipe(
        name="digits",
        model=build_model,
        data=build_data,
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        optimizer=sgd(momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=one_cycle(),
        batch_size=128,
        lr=0.1,
        lr_batch_size=128,
        epochs=20,
        train_samples=1437,
        max_grad_norm=1.0,
        in_memory=True,
    )


def build_model() -> nn.Module:
    """Return the net: images (N, 1, 8, 8) in [0, 1] to logits (N, 10)."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def build_data() -> Data:
    """Return the digits as (image, label), every fifth held out."""
    import torch
    from torch.utils.data import TensorDataset

    images, labels = read_digits()
    held_out = torch.arange(len(labels)) % 5 == 0
    return Data(
        train=TensorDataset(images[~held_out], labels[~held_out]),
        evaluation=TensorDataset(images[held_out], labels[held_out]),
    )


def read_digits() -> tuple[Tensor, Tensor]:
    """Return images (1797, 1, 8, 8) in [0, 1] and labels (1797,) from a file of scikit-learn.

    scikit-learn is not imported, which would take longer than the training.
    """
    from importlib.metadata import distribution

    import numpy as np
    import torch

    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(str(file), delimiter=",", dtype=np.float32))
    return rows[:, :64].view(-1, 1, 8, 8) / 16, rows[:, 64].long()


def cross_entropy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies and the number of digits."""
    from torch.nn.functional import cross_entropy

    labels = batch[1]
    return cross_entropy(logits, labels, reduction="sum"), len(labels)


def accuracy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the number of correctly classified digits and the number of digits."""
    labels = batch[1]
    return (logits.argmax(1) == labels).sum(), len(labels)


if __name__ == "__main__":
    main(digits)
