"""Residual networks on CIFAR-10, with super-convergence.

`resnet` is the experiment of Smith and Topin, "Super-Convergence" (arXiv:1708.07120): ResNet-56
(He et al., arXiv:1512.03385, section 4.2), batches of 1,000, one cycle from 0.1 to 3.0 and down in
10,000 steps. It reads the binary version of CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html)
from `data=FOLDER`.

Verified on 2 CPU ranks: `resnet20` trains on random pixels in CIFAR-10's format. The paper's 92 %
on CIFAR-10 has not been reproduced.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import Data, Recipe, RecipeError, main, one_cycle, sgd

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

CIFAR = Path("cifar-10")
"""The default folder of CIFAR-10."""

_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def resnet(*, data: Path = CIFAR, blocks: int = 9) -> Recipe:
    """ResNet-56 on CIFAR-10, one cycle up to a learning rate of 3 (super-convergence).

    Args:
        data: Folder of CIFAR-10's batches.
        blocks: Residual blocks in each of the three stages: 9 make a ResNet-56.
    """
    return Recipe(
        name="resnet",
        model=lambda: build_resnet([blocks] * 3, [16, 32, 64], num_classes=10, stem="small"),
        data=lambda: build_cifar(data),
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        optimizer=sgd(momentum=0.9, weight_decay=1e-4),
        schedule=one_cycle(div_factor=30.0, cycle_momentum=False),
        batch_size=1000,
        lr=3.0,
        lr_batch_size=1000,
        steps=10_000,
        channels_last=True,
    )


def resnet20(*, data: Path = CIFAR) -> Recipe:
    """ResNet-20 on CIFAR-10, a third of the computation.

    Args:
        data: Folder of CIFAR-10's batches.
    """
    return replace(resnet(data=data, blocks=3), name="resnet20")


def build_resnet(blocks: list[int], widths: list[int], *, num_classes: int, stem: str) -> nn.Module:
    """Return a residual network: images (N, 3, H, W) to logits (N, num_classes).

    Args:
        blocks: Blocks of two convolutions in each stage.
        widths: Channels of each stage; each stage but the first halves height and width.
        num_classes: Number of logits.
        stem: `small` for images of up to 64 pixels; `large` first reduces height and width to a
            quarter.
    """
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        """Two convolutions with a parameter-free shortcut (option A of the paper)."""

        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.one = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            self.norm_one = nn.BatchNorm2d(outputs)
            self.two = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            self.norm_two = nn.BatchNorm2d(outputs)
            self.stride, self.added = stride, outputs - inputs

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm_one(self.one(x)).relu()
            y = self.norm_two(self.two(y))
            # The shortcut skips pixels and pads channels with zeros.
            strided = x[:, :, :: self.stride, :: self.stride]
            shortcut = functional.pad(strided, (0, 0, 0, 0, 0, self.added))
            output: Tensor = (y + shortcut).relu()
            return output

    if stem == "large":
        first: list[nn.Module] = [nn.Conv2d(3, widths[0], 7, 2, padding=3, bias=False)]
        pool: list[nn.Module] = [nn.MaxPool2d(3, 2, padding=1)]
    else:
        first, pool = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False)], []
    stages: list[nn.Module] = []
    inputs = widths[0]
    for number, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        for index in range(count):
            stages.append(Block(inputs, width, stride=2 if number and index == 0 else 1))
            inputs = width
    net = nn.Sequential(
        *first,
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
        *pool,
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, num_classes),
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return net


def build_cifar(folder: Path) -> Data:
    """Return CIFAR-10 as (image, label): 50,000 augmented training and 10,000 test images."""
    training = [f"data_batch_{number}" for number in range(1, 6)]
    return Data(
        train=_Cifar(folder, training, augment=True),
        evaluation=_Cifar(folder, ["test_batch"], augment=False),
    )


class _Cifar:
    """The images and labels of some batches of CIFAR-10, kept as bytes."""

    def __init__(self, folder: Path, names: list[str], *, augment: bool) -> None:
        import numpy as np

        batches = [read_batch(folder / f"{name}.bin") for name in names]
        self.images = np.concatenate([images for images, _ in batches])
        self.labels = np.concatenate([labels for _, labels in batches])
        self._augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import torch

        image = torch.from_numpy(self.images[index])
        if self._augment:
            # Shift by up to 4 pixels with zeros from outside, and mirror half of the images.
            padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
            top, left = random.randrange(9), random.randrange(9)  # noqa: S311
            image = padded[:, top : top + 32, left : left + 32]
            if random.random() < 0.5:  # noqa: S311
                image = image.flip(2)
        return normalise(image, _CIFAR_MEAN, _CIFAR_STD), int(self.labels[index])


def read_batch(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return images (N, 3, 32, 32) and labels (N,), as bytes, of a binary batch of CIFAR-10.

    Raises:
        RecipeError: The file is missing or incomplete.
    """
    import numpy as np

    try:
        rows = np.frombuffer(bytearray(path.read_bytes()), np.uint8)
    except FileNotFoundError:
        raise RecipeError(
            f"CIFAR-10 is not in {path.parent.absolute()}: there is no {path.name}. Unpack "
            "cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and pass its "
            "folder as data=FOLDER. The version for Python is not read, because reading it would "
            "unpickle, and so could run, whatever is in the file."
        ) from None
    if len(rows) % 3073 or not len(rows):
        raise RecipeError(f"{path} is incomplete: it has {len(rows):,} bytes. Download it again.")
    table = rows.reshape(-1, 3073)
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0]


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return bytes (3, H, W) as floats, normalised with the mean and deviation of the data."""
    import torch

    scaled = pixels.float() / 255
    return (scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def cross_entropy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies and the number of images."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])


def accuracy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the number of correctly classified images and the number of images."""
    return (logits.argmax(1) == batch[1]).sum(), len(batch[1])


if __name__ == "__main__":
    main(resnet)
