"""Recipes whose steps depend on how the batch is split, each for one reason."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from worlds import Noisy, build_model, cross_entropy, worlds

from launcher import Data, Recipe, constant

if TYPE_CHECKING:
    from torch import Tensor, nn


def batch_norm() -> Recipe:
    """Digits through blocks with BatchNorm, in batches of 50 without a shorter last one."""
    return replace(
        worlds(), name="batch_norm", model=build_batch_norm, batch_size=50, schedule=constant()
    )


def instance_norm() -> Recipe:
    """Digits through InstanceNorm with running statistics, in batches of 50."""
    return replace(batch_norm(), name="instance_norm", model=build_instance_norm)


def dropout() -> Recipe:
    """Digits through a model with dropout."""
    return replace(worlds(), name="dropout", model=build_dropout)


def mean() -> Recipe:
    """Digits with a loss that returns a mean instead of a sum."""
    return replace(worlds(), name="mean", loss=mean_loss)


def unseeded() -> Recipe:
    """Digits with augmentation from the operating system's random generator."""
    return replace(worlds(), name="unseeded", data=lambda: Data(train=Unseeded(0, 250, 0.0)))


class Unseeded(Noisy):
    """Digits with noise that does not depend on any seed."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return image + random.SystemRandom().gauss(0, 0.5), label


def mean_loss(logits: Tensor, batch: Any) -> tuple[Tensor, int]:
    """Return the mean of the loss, where a recipe must return the sum, and the sample count."""
    total, count = cross_entropy(logits, batch)
    return total / count, count


def build_dropout() -> nn.Module:
    """Return the model of `worlds` with dropout of half of its logits."""
    from torch import nn

    return nn.Sequential(build_model(), nn.Dropout(0.5))


def build_instance_norm() -> nn.Module:
    """Return a model from images (N, 1, 8, 8) to logits (N, 10), with InstanceNorm."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.InstanceNorm2d(8, track_running_stats=True),
        nn.Flatten(), nn.Linear(8 * 64, 10),
    )  # fmt: skip


def build_batch_norm() -> nn.Module:
    """Return a model from images (N, 1, 8, 8) to logits (N, 10), with BatchNorm in two blocks."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            # SiLU is smooth: with ReLU, rounding can switch a unit on or off.
            return x + nn.functional.silu(self.norm(self.conv(x)))

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Sequential(Block(), Block()), nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )  # fmt: skip
