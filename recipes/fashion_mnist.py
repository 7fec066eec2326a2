"""Fashion-MNIST, ten classes of clothing in 28 x 28 pixels: a small convolutional net.

The data are the four files of Zalando Research (MIT licence). Debian packages them as
`dataset-fashion-mnist`; `data=FOLDER` reads them from another folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import Data, Recipe, RecipeError, main, one_cycle, sgd

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
    from torch.utils.data import TensorDataset

DATA = Path("/usr/share/datasets/fashion-mnist")
"""The folder in which Debian's package installs the files."""

MEAN, STD = 0.2860, 0.3530
"""Mean and standard deviation of the training pixels, scaled to [0, 1]."""


def fashion_mnist(*, data: Path = DATA, label_smoothing: float = 0.1) -> Recipe:
    """Fashion-MNIST, ten classes of clothing: a small conv net that trains in a minute on a CPU.

    Args:
        data: Folder of Fashion-MNIST's four files.
        label_smoothing: Weight of the classes that a label is not.
    """
    return Recipe(
        name="fashion_mnist",
        model=build_model,
        data=lambda: build_data(data),
        loss=lambda logits, batch: cross_entropy(logits, batch, label_smoothing),
        metrics={"accuracy": accuracy},
        optimizer=sgd(momentum=0.9, nesterov=True),
        schedule=one_cycle(),
        batch_size=64,
        lr=0.2,
        lr_batch_size=64,
        epochs=2,
        train_samples=60_000,
        in_memory=True,
    )


def build_model() -> nn.Module:
    """Return a net of 33,658 weights: normalised images (N, 1, 28, 28) to logits (N, 10)."""
    from torch import nn

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16), *block(16, 32), *block(32, 64), nn.Flatten(), nn.Linear(64 * 4 * 4, 10)
    )


def build_data(folder: Path) -> Data:
    """Return the 60,000 training and 10,000 test images as (image, label)."""
    return Data(train=_read_split(folder, "train"), evaluation=_read_split(folder, "t10k"))


def _read_split(folder: Path, split: str) -> TensorDataset:
    import torch
    from torch.utils.data import TensorDataset

    images = torch.from_numpy(read_idx(folder / f"{split}-images-idx3-ubyte.gz", dimensions=3))
    labels = torch.from_numpy(read_idx(folder / f"{split}-labels-idx1-ubyte.gz", dimensions=1))
    pixels = images.unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)
    return TensorDataset(pixels, labels.long())


def read_idx(path: Path, *, dimensions: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of a gzipped IDX file as an array.

    Args:
        path: The file.
        dimensions: The number of dimensions that it must have.

    Raises:
        RecipeError: The file is missing, damaged or of another type.
    """
    import gzip
    import math
    import zlib

    import numpy as np

    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise RecipeError(
            f"Fashion-MNIST is not in {path.parent}: {path.name} is missing. Install Debian's "
            "package dataset-fashion-mnist, or put the four files of "
            "https://github.com/zalandoresearch/fashion-mnist into a folder and give data=FOLDER."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise RecipeError(f"Cannot read {path}: {error}. Download it again.") from None
    # Header: the bytes 0, 0, 8 (unsigned bytes) and the dimensions; then big-endian sizes.
    header = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:header], dtype=">u4").tolist()
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) - header != math.prod(shape):
        raise RecipeError(
            f"{path} is not a complete IDX file of bytes in {dimensions} dimensions. Download it "
            "again."
        )
    values = np.frombuffer(bytearray(content[header:]), dtype=np.uint8)
    array: np.ndarray[Any, np.dtype[np.uint8]] = values.reshape(shape)
    return array


def cross_entropy(
    logits: Tensor, batch: tuple[Tensor, Tensor], label_smoothing: float = 0.0
) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies and the number of images."""
    from torch.nn.functional import cross_entropy

    labels = batch[1]
    total = cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    return total, len(labels)


def accuracy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the number of correctly classified images and the number of images."""
    labels = batch[1]
    return (logits.argmax(1) == labels).sum(), len(labels)


if __name__ == "__main__":
    main(fashion_mnist)
