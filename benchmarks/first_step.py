"""Recipe that records when its first optimizer step ended: digits, 5 steps."""

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
    """Digits whose ranks append the time of the first step to `moments`, on the monotonic clock."""
    return replace(
        digits(),
        name="first_step",
        model=lambda: build_model(Path(moments)),
        steps=5,
        epochs=None,
        num_workers=workers,
    )


def build_model(moments: Path) -> nn.Module:
    """Return the net of digits with a hook that writes the time before its second forward pass."""
    net: nn.Module = digits().model()
    calls = 0

    def record_time(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            with moments.open("a") as file:
                file.write(f"{time.monotonic()}\n")

    net.register_forward_pre_hook(record_time)
    return net


if __name__ == "__main__":
    main(first_step)
