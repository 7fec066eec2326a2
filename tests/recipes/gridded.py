"""A small regression that evaluates often, for sweeps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from launcher import Data, Evaluation, Recipe, main, one_cycle, sgd

if TYPE_CHECKING:
    from torch import Tensor, nn


def gridded(
    *, width: int = 4, fails: bool = False, milliseconds: float = 0.0, apart: bool = False
) -> Recipe:
    """A sum of four numbers, by one hidden layer with dropout.

    Args:
        width: Width of the hidden layer.
        fails: Whether the training raises an exception after its first step.
        milliseconds: Time that each step takes at least.
        apart: Whether there are two evaluation sets, the first with a schedule of its own.
    """
    calls = 0

    def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        nonlocal calls
        calls += outputs.requires_grad
        if fails and calls > 1:
            raise ValueError("it fails")
        time.sleep(milliseconds / 1000)
        return ((outputs - batch[1]) ** 2).sum(), len(batch[1])

    return Recipe(
        name="gridded",
        model=lambda: build_model(width),
        data=build_two_sets if apart else build_data,
        loss=loss,
        metrics={"error": error},
        optimizer=sgd(momentum=0.9),
        schedule=one_cycle(),
        batch_size=16,
        lr=0.05,
        lr_rule="none",
        steps=18,
        evaluate_every=2,
        train_samples=64,
        in_memory=True,
    )


def build_model(width: int) -> nn.Module:
    """Return a model from (N, 4) to (N, 1)."""
    from torch import nn

    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 1))


def build_data() -> Data:
    """Return 64 samples to train on and 16 to evaluate on."""
    import torch
    from torch.utils.data import TensorDataset

    inputs = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    sums = inputs.sum(1, keepdim=True)
    return Data(
        train=TensorDataset(inputs[:64], sums[:64]),
        evaluation=TensorDataset(inputs[64:], sums[64:]),
    )


def build_two_sets() -> Data:
    """Return the same with two evaluation sets, of which dev is evaluated every three steps."""
    data = build_data()
    sets = {"dev": Evaluation(data.evaluation, every=3), "test": data.evaluation}
    return Data(train=data.train, evaluation=sets)


def error(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the absolute error."""
    return (outputs - batch[1]).abs().sum(), len(batch[1])


if __name__ == "__main__":
    main(gridded)
