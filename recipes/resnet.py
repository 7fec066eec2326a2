"""Residual networks: ResNet-56 on CIFAR-10 with super-convergence, ResNet-18 on a folder of images.

`resnet` is the experiment of Smith and Topin, "Super-Convergence" (arXiv:1708.07120): ResNet-56
(He et al., arXiv:1512.03385, section 4.2), batches of 1,000, one cycle from 0.1 to 3.0 and down in
10,000 steps. It reads CIFAR-10's batches, the binary ones or those for Python, from `data=FOLDER`
(https://www.cs.toronto.edu/~kriz/cifar.html); nothing in them is unpickled.

`images` takes a folder with a folder of JPEG, PNG or WebP files for each class, in `train` and
`val`, of any size. They are decoded and augmented in the DataLoader's workers.

Verified on 2 CPU ranks: `images` on 400 pictures of Fashion-MNIST written as JPEGs, where it learns
four kinds; `resnet20` on batches in CIFAR-10's formats, of random pixels. The paper's
92 % on CIFAR-10 was not run here.
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
"""Where CIFAR-10 is looked for."""

_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def resnet(*, data: Path = CIFAR, blocks: int = 9) -> Recipe:
    """ResNet-56 on CIFAR-10, one cycle up to a learning rate of 3 (super-convergence)."""
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
    """ResNet-20 on CIFAR-10, a third of the work."""
    return replace(resnet(data=data, blocks=3), name="resnet20")


def images(
    *, data: Path = Path("images"), size: int = 224, widths: str = "64,128,256,512"
) -> Recipe:
    """ResNet-18 on a folder of images of any size, a folder for each class."""
    stages = [int(width) for width in widths.split(",")]
    return Recipe(
        name="images",
        model=lambda: build_resnet(
            [2] * len(stages),
            stages,
            num_classes=len(class_names(data / "train")),
            stem="large" if size > 64 else "small",
        ),
        data=lambda: build_images(data, size),
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        optimizer=sgd(momentum=0.9, nesterov=True, weight_decay=5e-5),
        schedule=one_cycle(),
        batch_size=256,
        lr=0.1,
        lr_batch_size=256,
        epochs=16,
        channels_last=True,
    )


def build_resnet(blocks: list[int], widths: list[int], *, num_classes: int, stem: str) -> nn.Module:
    """Return a residual network: images (N, 3, H, W) to logits (N, num_classes).

    Args:
        blocks: Of two convolutions, in each stage.
        widths: Channels of each stage; each but the first halves height and width.
        num_classes: Logits.
        stem: `small` for images of up to 64 pixels, `large` quarters them first.
    """
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        """Two convolutions, added to their input; where its shape differs, to a part of it."""

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
            # Option A of the paper: fewer pixels, and channels of zeros; no weights.
            kept = x[:, :, :: self.stride, :: self.stride]
            shortcut = functional.pad(kept, (0, 0, 0, 0, 0, self.added))
            added: Tensor = (y + shortcut).relu()
            return added

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
    """Return CIFAR-10 as (image, label): 50,000 images, flipped and moved, and 10,000 held out."""
    training = [f"data_batch_{number}" for number in range(1, 6)]
    return Data(
        train=_Cifar(folder, training, augment=True),
        evaluation=_Cifar(folder, ["test_batch"], augment=False),
    )


class _Cifar:
    """Images as bytes (N, 3, 32, 32) and labels, of some of the files."""

    def __init__(self, folder: Path, names: list[str], *, augment: bool) -> None:
        import numpy as np

        read = [read_batch(folder, name) for name in names]
        self.images = np.concatenate([images for images, _ in read])
        self.labels = np.concatenate([labels for _, labels in read])
        self._augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import torch

        image = torch.from_numpy(self.images[index])
        if self._augment:
            # Up to 4 pixels to any side, with zeros from outside, and mirrored half of the time.
            padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
            top, left = random.randrange(9), random.randrange(9)  # noqa: S311  # no secret
            image = padded[:, top : top + 32, left : left + 32]
            if random.random() < 0.5:  # noqa: S311
                image = image.flip(2)
        return normalise(image, _CIFAR_MEAN, _CIFAR_STD), int(self.labels[index])


def read_batch(folder: Path, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return images (N, 3, 32, 32) and labels (N,) of a batch of CIFAR-10, as bytes.

    Raises:
        RecipeError: There is none, or it is not whole.
    """
    import numpy as np

    binary, pickled = folder / f"{name}.bin", folder / name
    try:
        if binary.is_file():
            rows = np.frombuffer(bytearray(binary.read_bytes()), np.uint8)
            if len(rows) % 3073 or not len(rows):
                raise RecipeError(f"{binary} is not whole: {len(rows):,} bytes. Get the file anew.")
            labels, images = rows.reshape(-1, 3073)[:, 0], rows.reshape(-1, 3073)[:, 1:]
        else:
            images, labels = _read_pickled(pickled)
    except FileNotFoundError:
        raise RecipeError(
            f"CIFAR-10 is not in {folder.absolute()}: there is no {name} or {name}.bin. Unpack "
            "cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html and give its "
            "folder as data=FOLDER."
        ) from None
    return images.reshape(-1, 3, 32, 32), labels


def _read_pickled(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return what is in a batch for Python, by looking at its opcodes: no code in it is run."""
    import pickletools

    import numpy as np

    images = np.zeros(0, np.uint8)
    labels: list[int] = []
    key: object = None
    try:
        for opcode, value, _ in pickletools.genops(path.read_bytes()):
            if isinstance(value, (str, bytes)) and len(value) < 100:
                key = value.decode() if isinstance(value, bytes) else value
            elif isinstance(value, (str, bytes)):
                content = value.encode("latin-1") if isinstance(value, str) else value
                if len(content) % 3072 == 0 and len(content) > len(images):
                    images = np.frombuffer(bytearray(content), np.uint8)
            elif key == "labels" and isinstance(value, int) and "PUT" not in opcode.name:
                labels.append(value)
    except ValueError as error:
        raise RecipeError(f"{path} is no batch of CIFAR-10: {error}. Get the file anew.") from None
    if not labels or len(images) != 3072 * len(labels):
        raise RecipeError(
            f"{path} is no batch of CIFAR-10: it has {len(labels)} labels and {len(images):,} "
            "bytes of images. Get the file anew, or the binary version."
        )
    return images, np.array(labels, np.uint8)


def build_images(folder: Path, size: int) -> Data:
    """Return the images of folder/train, augmented, and of folder/val as (image, label)."""
    names = class_names(folder / "train")
    held_out = folder / "val"
    return Data(
        train=_Folder(folder / "train", names, size, augment=True),
        evaluation=_Folder(held_out, names, size, augment=False) if held_out.is_dir() else None,
    )


def class_names(folder: Path) -> list[str]:
    """Return the names of the classes: the folders in `folder`.

    Raises:
        RecipeError: There are none.
    """
    names = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if not names:
        raise RecipeError(
            f"{folder.absolute()} has no folders, one for each class. Give data=FOLDER with "
            "FOLDER/train/<class>/*.jpg and FOLDER/val/<class>/*.jpg."
        )
    return names


class _Folder:
    """Images of any size, in a folder for each class."""

    def __init__(self, folder: Path, names: list[str], size: int, *, augment: bool) -> None:
        self.files = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in _SUFFIXES
        ]
        if not self.files:
            raise RecipeError(f"{folder} has no images: files of {', '.join(sorted(_SUFFIXES))}.")
        self._size, self._augment = size, augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import numpy as np
        import torch
        from PIL import Image

        path, label = self.files[index]
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        box = part_of(*image.size) if self._augment else middle_of(*image.size)
        image = image.resize((self._size, self._size), Image.Resampling.BILINEAR, box=box)
        if self._augment and random.random() < 0.5:  # noqa: S311
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        return normalise(pixels, _IMAGENET_MEAN, _IMAGENET_STD), label


def part_of(width: int, height: int) -> tuple[float, float, float, float]:
    """Return a random part of an image, between a quarter and all of it, nearly square."""
    area = width * height * random.uniform(0.25, 1.0)  # noqa: S311
    ratio = random.uniform(3 / 4, 4 / 3)  # noqa: S311
    wide, high = min((area * ratio) ** 0.5, width), min((area / ratio) ** 0.5, height)
    left, top = random.uniform(0, width - wide), random.uniform(0, height - high)  # noqa: S311
    return left, top, left + wide, top + high


def middle_of(width: int, height: int) -> tuple[float, float, float, float]:
    """Return the middle of an image: seven eighths of its shorter side, square."""
    side = min(width, height) * 7 / 8
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return bytes (3, H, W) as floats with the mean and the deviation of the data taken out."""
    import torch

    scaled = pixels.float() / 255
    return (scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def cross_entropy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies, and how many."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])


def accuracy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the number of images recognised, and how many there are."""
    return (logits.argmax(1) == batch[1]).sum(), len(batch[1])


if __name__ == "__main__":
    main(resnet)
