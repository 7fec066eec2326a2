"""Images in folders that are named for their classes, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.engine.data.data_files import digest_of
from launcher.engine.data.extras import import_extra
from launcher.engine.data.stores.even_blocks import spaced
from launcher.errors import RecipeError, SampleError
from launcher.paths import leads_to_dir
from launcher.printable import error_line, printable_line, shortened

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""The extensions that torchvision takes for images."""

_NUM_SAMPLED = 64
"""Number of images, evenly spaced, of whose files the fingerprint has pieces."""


class ImageFolder:
    """A map-style data set of the images below a folder, with one folder for each class.

    `images[i]` is a pair of an image and the number of its class. The image is an RGB image of
    Pillow, or the result of `transform` for it. Classes are numbered in the sorted order of their
    folders' names, and images in the sorted order of their classes, folders and names, as in
    torchvision. Files and folders whose names begin with a dot are left out.

    Args:
        folder: The folder with the folders of the classes.
        transform: A function of an image; None returns the image itself.

    Raises:
        RecipeError: The folder is missing, a class has no images, or Pillow is not installed.
    """

    def __init__(
        self, folder: Path | str, *, transform: Callable[[Any], Any] | None = None
    ) -> None:
        import_extra("PIL", "images", "images")
        self._folder, self._transform = Path(folder), transform
        try:
            self.classes: list[str] = sorted(
                entry.name
                for entry in os.scandir(self._folder)
                if not entry.name.startswith(".") and leads_to_dir(entry)
            )
            """The names of the classes, by their numbers."""
        except OSError as error:
            raise RecipeError(
                f"Cannot read the folder of images {printable_line(str(folder))}: {error.strerror}."
            ) from None
        if not self.classes:
            raise RecipeError(
                f"{printable_line(str(folder))} has no folders. Give the folder that has one "
                "folder of images for each class."
            )
        names: list[bytes] = []
        counts = []
        for name in self.classes:
            found = list(_images(self._folder, name))
            if not found:
                raise RecipeError(
                    f"{printable_line(str(self._folder / name))} has no images "
                    f"({', '.join(_EXTENSIONS)}). Remove the folder, or convert its images."
                )
            names += found
            counts.append(len(found))
        # Kept in two arrays: a list of a million names would be copied in every worker.
        self._names = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])
        self.targets: NDArray[np.int64] = np.repeat(np.arange(len(counts)), counts)
        """The number of the class of each image."""

    @property
    def class_to_idx(self) -> dict[str, int]:
        """The number of each class."""
        return {name: number for number, name in enumerate(self.classes)}

    @property
    def chunks(self) -> NDArray[np.int64]:
        """The number of images in each file, which is 1."""
        return np.ones(len(self), np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        path = self.file_of(index)
        try:
            # Pillow reads the file to its end before it closes it.
            with Image.open(path) as file:
                image = file.convert("RGB")
        except MemoryError:
            raise
        except FileNotFoundError:
            raise SampleError(
                f"Image {index:,}, {printable_line(path)}, was removed during the run. Do not "
                "change the folder during a run, and start it again."
            ) from None
        except Exception as error:  # noqa: BLE001  # damaged images raise anything
            raise SampleError(
                f"Image {index:,}, {printable_line(path)}, cannot be read: "
                f"{shortened(error_line(error), 300)}. Copy the file again, or remove it."
            ) from None
        target = int(self.targets[index])
        return (image if self._transform is None else self._transform(image)), target

    def fingerprint(self) -> str:
        """Return a digest of all names, and of the sizes and pieces of files, evenly spaced."""
        from launcher.engine.data.index_fingerprint import describe_files

        chosen = spaced(len(self), _NUM_SAMPLED)
        files = [repr(describe_files([self.file_of(index)])) for index in chosen]
        return digest_of(self._names, self._ends.tobytes(), self.targets.tobytes(), *files)

    def file_of(self, index: int) -> str:
        """Return the path of an image."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        name = self._names[int(self._ends[index]) : int(self._ends[index + 1])]
        return os.path.join(self._folder, os.fsdecode(name))  # noqa: PTH118  # much faster

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return (self[index] for index in range(len(self)))


def _images(folder: Path, name: str) -> Iterator[bytes]:
    """Yield the paths of the images of a class, relative to `folder`, in torchvision's order."""
    start, places = len(os.fspath(folder)) + 1, []
    for place, folders, files in os.walk(folder / name, onerror=_refuse, followlinks=True):
        folders[:] = [each for each in folders if not each.startswith(".")]
        places.append((place[start:], files))
    for place, files in sorted(places):
        for file in sorted(files):
            if file.lower().endswith(_EXTENSIONS) and not file.startswith("."):
                yield os.fsencode(f"{place}/{file}")


def _refuse(error: OSError) -> None:
    raise RecipeError(
        f"Cannot read the folder {printable_line(str(error.filename))}: {error.strerror}. Make it "
        "readable, or remove it."
    )
