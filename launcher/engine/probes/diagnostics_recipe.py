"""The recipe of `launcher doctor`, whose ranks test their devices and train nothing."""

from __future__ import annotations

from typing import Any, Literal

from launcher.recipe.recipe import Data, Recipe

DIAGNOSTICS_TIMEOUT = 30.0
"""Seconds after which ranks that examine themselves are ended, for each stage of it."""


def diagnostics_recipe(num_ranks: int, device: Literal["cuda", "cpu"] | None) -> Recipe:
    """Return the recipe of ranks that examine themselves, which trains nothing.

    Args:
        num_ranks: The number of ranks; the batch has one sample for each.
        device: What the ranks compute on; None takes the GPUs where there are any.
    """

    def not_trainable(*_: object) -> Any:
        raise NotImplementedError

    return Recipe(
        name="doctor",
        model=not_trainable,
        data=lambda: Data(train=()),
        loss=not_trainable,
        batch_size=num_ranks,
        lr=1.0,
        lr_rule="none",
        steps=1,
        device=device,
        hang_timeout={"start": DIAGNOSTICS_TIMEOUT},
    )
