"""A recipe in which one rank is slow."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from launcher import Recipe, main
from launcher.recipes.digits import digits


def straggling(*, pause: float = 0.02, rank: int = 1) -> Recipe:
    """Digits, with one rank that sleeps for `pause` seconds in every forward pass."""

    def forward(model: Any, batch: Any) -> Any:
        if int(os.environ.get("RANK", "0")) == rank:
            time.sleep(pause)
        return model(batch[0])

    return replace(digits(), name="straggling", forward=forward)


if __name__ == "__main__":
    main(straggling)
