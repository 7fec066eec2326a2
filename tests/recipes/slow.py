"""A recipe whose samples are slow to read: by waiting, by computing, or by rare long stalls."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from launcher import Data, Recipe, constant, main, sgd

if TYPE_CHECKING:
    from torch import Tensor, nn


How = Literal["waits", "works", "stalls"]


def slow(
    *, how: How = "waits", milliseconds: float = 10.0, step_milliseconds: float = 0.0
) -> Recipe:
    """A model on samples that are slow to read in the way `how`, and which waits in each step."""

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        time.sleep(step_milliseconds / 1000)
        outputs: Tensor = model(batch)
        return outputs

    return Recipe(
        name="slow",
        model=build_model,
        data=lambda: Data(train=Slow(how, milliseconds / 1000)),
        loss=lambda outputs, batch: (outputs.sum(), len(batch)),
        forward=forward,
        optimizer=sgd(momentum=0.0),
        schedule=constant(),
        batch_size=32,
        lr=1e-6,
        lr_rule="none",
        epochs=1,
        train_samples=4096,
    )


def build_model() -> nn.Module:
    """Return a model from (N, 8) to (N, 1)."""
    from torch import nn

    return nn.Linear(8, 1)


class Slow:
    """Vectors that take `seconds` each to read, or with "stalls" only each 512th."""

    def __init__(self, how: str, seconds: float) -> None:
        self._how, self._seconds = how, seconds

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> Tensor:
        import torch

        if self._how == "stalls":
            time.sleep(self._seconds if index % 512 == 0 else 0)
        elif self._how == "waits":
            time.sleep(self._seconds)
        else:
            end_time = time.thread_time() + self._seconds
            while time.thread_time() < end_time:
                pass
        return torch.full((8,), float(index))


if __name__ == "__main__":
    main(slow)
