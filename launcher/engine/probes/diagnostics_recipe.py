"""The recipe of `launcher doctor`, whose ranks test their devices and train nothing."""

from __future__ import annotations

from typing import Any

from launcher.recipe.recipe import Data, Recipe


def diagnostics_recipe() -> Recipe:
    """Return a recipe from which diagnostics can be planned, and which cannot be trained."""

    def not_trainable(*_: object) -> Any:
        raise NotImplementedError

    return Recipe(
        name="doctor",
        model=not_trainable,
        data=lambda: Data(train=()),
        loss=not_trainable,
        batch_size=1,
        lr=1.0,
        lr_rule="none",
        steps=1,
    )
