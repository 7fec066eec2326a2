"""Train a ResNet-18 on images and their classes, whatever format they are stored in.

`data=` and `val=` each name one of these, as a path or as a URL of `https`, `s3` or `gs`:

- a folder with a folder of JPEG, PNG or WebP files for each class (a path only),
- WebDataset tars, with the class in the file `.cls`: `a.tar`, `train-{000..146}.tar`, or a folder,
- Parquet files, also those of the Hugging Face Hub, or a folder of them,
- a folder of MosaicML Streaming, or of LitData (a path only), with its index.json,
- an LMDB environment with keys `CLASS/NAME`: a file `*.mdb`, or its folder,
- a SQLite database, `*.db`, with a table `images`.

Elsewhere the columns are named `image` and `label`. A folder with the subfolders `train` and `val`
is both. DataLoader workers decode and augment the images. With `shuffle=window`, storage that is
slow at random reads is read in sequence.

Verified on 2 CPU ranks: four classes are learned from 400 pictures of Fashion-MNIST in folders of
JPEGs. All formats give the same samples.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import Data, Recipe, RecipeError, main, one_cycle, sgd
from launcher.recipes.resnet import accuracy, build_resnet, cross_entropy, normalise

if TYPE_CHECKING:
    from torch import Tensor

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels."""

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
_CLASS_COLUMNS = ("label", "cls", "class")

Sample = tuple["Tensor", int]
"""An image of shape (3, size, size) and the number of its class."""


def images(
    *,
    data: str = "images",
    val: str = "",
    classes: int = 0,
    size: int = 224,
    widths: str = "64,128,256,512",
    balanced: bool = False,
) -> Recipe:
    """ResNet-18 on images of any size, in folders, tars, Parquet, MDS, LitData, LMDB or SQLite.

    Args:
        data: Training images, or a folder with the subfolders train and val.
        val: Images to evaluate on; empty evaluates on the subfolder val, or not at all.
        classes: Number of classes; 0 counts the folders of `data`.
        size: Height and width of the images that the net sees, in pixels.
        widths: Channels of each stage, separated by commas.
        balanced: Whether each class of a folder is seen equally often.
    """
    train, held_out = find_parts(data, val)
    stages = [int(width) for width in widths.split(",")]
    return Recipe(
        name="images",
        model=lambda: build_resnet(
            [2] * len(stages),
            stages,
            num_classes=classes or count_folders(train),
            stem="large" if size > 64 else "small",
        ),
        data=lambda: build_data(train, held_out, size, balanced=balanced),
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


def find_parts(data: str, val: str) -> tuple[str, str]:
    """Return where the training images are, and those to evaluate on; empty means nowhere."""
    if not is_url(data) and (Path(data) / "train").is_dir():
        held_out = Path(data) / "val"
        return str(Path(data) / "train"), val or (str(held_out) if held_out.is_dir() else "")
    return data, val


def is_url(location: str) -> bool:
    """Return whether a location is a URL."""
    return "://" in location


def count_folders(location: str) -> int:
    """Return the number of classes of a folder of images.

    Raises:
        RecipeError: `location` is not a folder with a folder for each class.
    """
    folder = Path(location)
    if is_url(location) or find_format(location) != "folder":
        raise RecipeError(f"Pass classes=N, the number of classes of {location}.")
    return sum(1 for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def build_data(train: str, held_out: str, size: int, *, balanced: bool = False) -> Data:
    """Return augmented training images, and images to evaluate on, as (image, class).

    Raises:
        RecipeError: Images are missing, or `balanced` is asked for and they lie in no folders.
    """
    training = open_images(train, lambda image: augmented(image, size))
    if balanced:
        training = balance(training)
    return Data(
        train=training,
        evaluation=open_images(held_out, lambda image: centred(image, size)) if held_out else None,
    )


def balance(images: Any) -> Any:
    """Return a data set in which each class has the same weight.

    Raises:
        RecipeError: The classes of `images` are not known without reading them all.
    """
    import numpy as np

    from launcher import ImageFolder, weighted

    if not isinstance(images, ImageFolder):
        raise RecipeError("balanced=true needs a folder of images, with a folder for each class.")
    counts = np.bincount(images.targets)
    return weighted(images, 1 / counts[images.targets], groups=images.targets)


def open_images(location: str, transform: Callable[[Any], Tensor]) -> Any:
    """Return the images at a location as a data set of (transformed image, class).

    Args:
        location: Path or URL, as the text at the top of this file describes.
        transform: A function of an RGB image of Pillow.

    Raises:
        RecipeError: There are no images, or a file is missing or damaged.
    """
    import launcher

    def of_columns(sample: Mapping[str, Any]) -> Sample:
        label = sample[found_column(sample, _CLASS_COLUMNS)]
        image = sample[found_column(sample, _IMAGE_COLUMNS)]
        return transform(decoded(image)), int(label)

    def of_entry(key: bytes, value: bytes) -> Sample:
        return transform(decoded(value)), int(key.partition(b"/")[0])

    if not (is_url(location) or "{" in location or Path(location).exists()):
        raise RecipeError(
            f"There are no images at {Path(location).absolute()}. Pass data=FOLDER, with a folder "
            "of images for each class, or another format that recipes/images.py lists."
        )
    opened: dict[str, Callable[[], Any]] = {
        "folder": lambda: launcher.ImageFolder(location, transform=transform),
        "tar": lambda: launcher.Shards(files_at(location, "*.tar"), decode=of_columns),
        "parquet": lambda: launcher.ParquetRows(files_at(location, "*.parquet"), decode=of_columns),
        "mds": lambda: launcher.MosaicShards(location, decode=of_columns),
        "lit": lambda: launcher.LitShards(location, decode=of_columns),
        "lmdb": lambda: launcher.LMDBSamples(location, decode=of_entry),
        "sqlite": lambda: launcher.SQLiteRows(location, "images", decode=of_columns),
    }
    return opened[find_format(location)]()


def find_format(location: str) -> str:
    """Return the format of images by the end of a path or URL, or by the files of a folder."""
    endings = {".tar": "tar", ".parquet": "parquet", ".mdb": "lmdb", ".db": "sqlite"}
    for ending, name in endings.items():
        if location.endswith(ending):
            return name
    if is_url(location):
        return "mds"
    folder = Path(location)
    if (folder / "data.mdb").is_file():
        return "lmdb"
    if (folder / "index.json").is_file():
        is_lit = b'"chunks"' in (folder / "index.json").read_bytes()
        return "lit" if is_lit else "mds"
    names = ("tar", "parquet")
    return next((name for name in names if any(folder.glob(f"*.{name}"))), "folder")


def files_at(location: str, pattern: str) -> list[str]:
    """Return the files that a location names: one, a range such as {000..146}, or a folder's."""
    numbers = re.search(r"\{(\d+)\.\.(\d+)\}", location)
    if numbers is not None:
        first, last = numbers.groups()
        before, after = location[: numbers.start()], location[numbers.end() :]
        names = range(int(first), int(last) + 1)
        return [f"{before}{number:0{len(first)}}{after}" for number in names]
    if is_url(location) or not Path(location).is_dir():
        return [location]
    return sorted(map(str, Path(location).glob(pattern)))


def found_column(sample: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return the first of some columns that a sample has.

    Raises:
        RecipeError: It has none of them.
    """
    for name in names:
        if name in sample:
            return name
    raise RecipeError(
        f"A sample has {', '.join(sample)}; expected one of {', '.join(names)}. Rename the column."
    )


def decoded(image: Any) -> Any:
    """Return an RGB image of Pillow from one, from the bytes of a file, or from {"bytes": ...}."""
    from PIL import Image

    if isinstance(image, Mapping):  # as the Hugging Face Hub stores images in Parquet
        image = image["bytes"]
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    return image.convert("RGB")


def augmented(image: Any, size: int) -> Tensor:
    """Return a random part of an image, mirrored in half of the cases: (3, size, size)."""
    from PIL import Image

    part = image.resize((size, size), Image.Resampling.BILINEAR, box=random_crop(*image.size))
    if random.random() < 0.5:  # noqa: S311
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_tensor(part)


def centred(image: Any, size: int) -> Tensor:
    """Return the central part of an image: (3, size, size)."""
    from PIL import Image

    box = centre_crop(*image.size)
    return to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def to_tensor(image: Any) -> Tensor:
    """Return an RGB image as normalised floats of shape (3, H, W)."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    return normalise(pixels, _MEAN, _STD)


def random_crop(width: int, height: int) -> tuple[float, float, float, float]:
    """Return a random box of a quarter to all of the area, with a ratio of 3:4 to 4:3."""
    area = width * height * random.uniform(0.25, 1.0)  # noqa: S311
    ratio = random.uniform(3 / 4, 4 / 3)  # noqa: S311
    wide, high = min((area * ratio) ** 0.5, width), min((area / ratio) ** 0.5, height)
    left, top = random.uniform(0, width - wide), random.uniform(0, height - high)  # noqa: S311
    return left, top, left + wide, top + high


def centre_crop(width: int, height: int) -> tuple[float, float, float, float]:
    """Return the central square box with seven eighths of the shorter side."""
    side = min(width, height) * 7 / 8
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


if __name__ == "__main__":
    main(images)
