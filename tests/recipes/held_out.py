"""Digits whose held-out samples a parameter chooses, with predictions of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worlds import Noisy, worlds

from launcher import Data, Recipe, main

if TYPE_CHECKING:
    from torch import Tensor


def held_out(*, samples: int = 70) -> Recipe:
    """Digits without augmentation, of which the last `samples` of 320 are held out."""
    return replace(
        worlds(),
        name="held_out",
        data=lambda: Data(train=Noisy(0, 250, 0.0), evaluation=Noisy(320 - samples, 320, 0.0)),
        record_samples=False,
        epochs=2,
        evaluate_every=4,
        checkpoint_every=4,
        keep_checkpoints=9,
    )


def predicting() -> Recipe:
    """The same, with columns of its own and files of pixels to predict."""
    return replace(held_out(), name="predicting", predict=columns, predict_data=read_lines)


def columns(model: Any, batch: Any) -> dict[str, Any]:
    """Return the class of each image, its name and its probabilities."""
    logits = model(batch if hasattr(batch, "shape") else batch[0])
    labels = logits.argmax(1)
    return {
        "label": labels,
        "name": [f"digit {label}" for label in labels.tolist()],
        "probabilities": logits.softmax(1),
    }


def read_lines(path: Path) -> tuple[list[list[float]], Any]:
    """Return the images in a file, a line of 64 numbers for each, and how they are collated."""
    images = [[float(text) for text in line.split()] for line in path.read_text().splitlines()]
    return images, collate


def collate(images: list[list[float]]) -> Tensor:
    """Return images (N, 1, 8, 8)."""
    import torch

    return torch.tensor(images).view(-1, 1, 8, 8)


if __name__ == "__main__":
    main(held_out)
