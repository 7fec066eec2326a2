"""Recipes that print while they train."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from worlds import cross_entropy, worlds

from launcher import Recipe, main

if TYPE_CHECKING:
    from torch import Tensor


def talking() -> Recipe:
    """Digits with a loss that prints through Python and through the file descriptor."""
    return replace(worlds(), name="talking", loss=_talking_loss, epochs=1)


def shouting() -> Recipe:
    """Digits with a loss that prints more than a small disk holds."""
    return replace(worlds(), name="shouting", loss=_shouting_loss, epochs=1)


def _shouting_loss(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    print(("x" * 99 + "\n") * 300)
    return cross_entropy(logits, batch)


def _talking_loss(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    rank = os.environ.get("RANK", "0")
    print(f"said by rank {rank}")
    os.write(2, f"written by rank {rank}\n".encode())
    return cross_entropy(logits, batch)


if __name__ == "__main__":
    main(talking)
