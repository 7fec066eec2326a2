"""Recipe with a convolutional net on generated images, large enough to keep a GPU busy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher import Data, Recipe, main, one_cycle, sgd

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASSES = 10


def images(*, width: int = 64, size: int = 64, samples: int = 8192, batch: int = 256) -> Recipe:
    """Images of random noise, and a residual net without a normalisation.

    Args:
        width: Channels of the net.
        size: Height and width of the images.
        samples: Number of images.
        batch: Images of an optimizer step.
    """
    return Recipe(
        name="images",
        model=lambda: build_model(width),
        data=lambda: Data(train=Noise(samples, size)),
        loss=cross_entropy,
        optimizer=sgd(momentum=0.9),
        schedule=one_cycle(),
        batch_size=batch,
        lr=0.01,
        lr_batch_size=batch,
        epochs=1,
        train_samples=samples,
    )


class Noise:
    """Images that are drawn from their index, by a DataLoader worker."""

    def __init__(self, samples: int, size: int) -> None:
        self._samples, self._size = samples, size

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import torch

        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, self._size, self._size, generator=generator), index % CLASSES


def build_model(width: int) -> nn.Module:
    """Return a net that maps images (N, 3, H, W) to logits (N, 10)."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(width, width, 3, padding=1)
            self.second = nn.Conv2d(width, width, 3, padding=1)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden: Tensor = self.second(self.first(inputs).relu())
            return inputs + 0.1 * hidden

    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, stride=2),
        *(Block() for _ in range(4)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, CLASSES),
    )


def cross_entropy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies and the number of images."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.float(), batch[1], reduction="sum"), len(batch[1])


if __name__ == "__main__":
    main(images)
