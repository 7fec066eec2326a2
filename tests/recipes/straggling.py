"""Digits, of which one rank takes a pause in every step."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from launcher import Recipe, main
from launcher.recipes.digits import digits


def straggling(*, pause: float = 0.02, rank: int = 1) -> Recipe:
    """Digits, and a rank that the others wait for."""

    def forward(model: Any, batch: Any) -> Any:
        if int(os.environ.get("RANK", "0")) == rank:
            time.sleep(pause)
        return model(batch[0])

    return replace(digits(), name="straggling", forward=forward)


if __name__ == "__main__":
    main(straggling)
