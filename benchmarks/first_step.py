"""A recipe that says when its first optimizer step was done: digits, 5 steps."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import Recipe, main
from launcher.recipes.digits import digits

if TYPE_CHECKING:
    from torch import nn


def first_step(*, moments: str = os.devnull, workers: int = 0) -> Recipe:
    """Digits; each rank adds a line to the file `moments`: the seconds of the monotonic clock."""
    return replace(
        digits(),
        name="first_step",
        model=lambda: build_model(Path(moments)),
        steps=5,
        epochs=None,
        num_workers=workers,
    )


def build_model(moments: Path) -> nn.Module:
    """Return the recipe's net; its second forward pass begins when the first step is done."""
    net: nn.Module = digits().model()
    calls = 0

    def note(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            with moments.open("a") as file:
                file.write(f"{time.monotonic()}\n")

    net.register_forward_pre_hook(note)
    return net


if __name__ == "__main__":
    main(first_step)
