"""A generator of handwritten digits: a small conditional GAN that trains in seconds on a CPU.

The discriminator learns to tell digits of scikit-learn from generated ones, and the generator to
deceive it (arXiv:1406.2661, with labels as in arXiv:1411.1784). They are two objectives, each with
parameters and an optimizer of its own, which take their turns on every batch.

Latent vectors are drawn in the data set. They are then a part of the sample, like augmentation, and
the same on any number of ranks.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from launcher import Data, Objective, Recipe, adamw, linear, main
from launcher.recipes.digits import read_digits

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    Batch = tuple[Tensor, Tensor, Tensor]

LATENTS, CLASSES, PIXELS = 32, 10, 64
"""Numbers that the generator starts from, kinds of digits, and pixels of an image."""

DOUBT = 0.1
"""Share of real digits that the discriminator is told are generated, so that it stays unsure."""


def gan(*, generator_lr: float = 0.002) -> Recipe:
    """A GAN on digits of 8 x 8 pixels: two objectives that train in seconds on a CPU.

    Args:
        generator_lr: Learning rate of the generator; lr is that of the discriminator.
    """
    return Recipe(
        name="gan",
        model=build_model,
        data=build_data,
        forward=compare,
        objectives=(
            Objective(name="discriminator", parameters="discriminator.*", loss=tell_apart),
            Objective(
                name="generator",
                parameters="generator.*",
                forward=judge_generated,
                loss=deceive,
                lr=generator_lr,
            ),
        ),
        metrics={"recognised": recognised},
        optimizer=adamw(beta1=0.5, weight_decay=0.0),
        schedule=linear(),
        batch_size=32,
        lr=0.002,
        lr_batch_size=32,
        lr_rule="sqrt",
        epochs=40,
        evaluate_every=450,
        train_samples=1437,
        in_memory=True,
    )


def build_model() -> nn.ModuleDict:
    """Return a generator and a discriminator, each of them with the label among its inputs."""
    from torch import nn

    return nn.ModuleDict(
        {
            "generator": nn.Sequential(
                nn.Linear(LATENTS + CLASSES, 128),
                nn.ReLU(),
                nn.Linear(128, 128),
                nn.ReLU(),
                nn.Linear(128, PIXELS),
                nn.Sigmoid(),
            ),
            "discriminator": nn.Sequential(
                nn.Linear(PIXELS + CLASSES, 128),
                nn.LeakyReLU(0.2),
                nn.Linear(128, 64),
                nn.LeakyReLU(0.2),
                nn.Linear(64, 1),
            ),
        }
    )


def build_data() -> Data:
    """Return the digits as (image, label, latents), every fifth held out."""
    import torch
    from torch.utils.data import Dataset

    class WithLatents(Dataset[Any]):
        def __init__(self, images: Tensor, labels: Tensor) -> None:
            self.images, self.labels = images, labels

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> Batch:
            return self.images[index], self.labels[index], torch.randn(LATENTS)

    images, labels = read_digits()
    held_out = torch.arange(len(labels)) % 5 == 0

    def part(chosen: Tensor) -> Dataset[Any]:
        return WithLatents(images[chosen], labels[chosen])

    return Data(train=part(~held_out), evaluation=part(held_out))


def generate(model: nn.ModuleDict, labels: Tensor, latents: Tensor) -> Tensor:
    """Return generated images (N, 64) in [0, 1] of the digits `labels`."""
    images: Tensor = model["generator"](_with_labels(latents, labels))
    return images


def compare(model: nn.ModuleDict, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the discriminator says of the digits and of generated ones, and the latter."""
    images, labels, latents = batch
    judge, generated = model["discriminator"], generate(model, labels, latents)
    return (
        judge(_with_labels(images.flatten(1), labels)),
        judge(_with_labels(generated, labels)),
        generated,
    )


def judge_generated(model: nn.ModuleDict, batch: Batch) -> Tensor:
    """Return what the discriminator says of generated digits: positive if they look real."""
    _, labels, latents = batch
    generated = generate(model, labels, latents)
    judgements: Tensor = model["discriminator"](_with_labels(generated, labels))
    return judgements


def _with_labels(values: Tensor, labels: Tensor) -> Tensor:
    import torch
    from torch.nn.functional import one_hot

    return torch.cat([values, one_hot(labels, CLASSES).to(values.dtype)], dim=1)


def tell_apart(outputs: tuple[Tensor, Tensor, Tensor], batch: Batch) -> tuple[Tensor, int]:
    """Return the discriminator's cross-entropy over pairs of real and generated digits, summed."""
    from torch.nn.functional import softplus

    real, generated, _ = outputs
    real, generated = real.float(), generated.float()
    return (softplus(-real) + DOUBT * real + softplus(generated)).sum(), len(batch[1])


def deceive(judgements: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Return the generator's loss, which is small where the discriminator takes images for real."""
    from torch.nn.functional import softplus

    return softplus(-judgements.float()).sum(), len(batch[1])


def recognised(outputs: tuple[Tensor, Tensor, Tensor], batch: Batch) -> tuple[Tensor, int]:
    """Return how many generated images are closest to the mean of the digit that was asked for."""
    import torch

    generated, labels = outputs[2], batch[1]
    means = mean_digits().to(generated)
    return (torch.cdist(generated, means).argmin(1) == labels).sum(), len(labels)


@functools.cache
def mean_digits() -> Tensor:
    """Return the mean image (10, 64) of each digit."""
    import torch

    images, labels = read_digits()
    return torch.stack([images[labels == digit].flatten(1).mean(0) for digit in range(CLASSES)])


if __name__ == "__main__":
    main(gan)
