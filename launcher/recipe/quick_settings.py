"""Checks of the settings of quick checkpoints, which each node keeps in a folder of its own."""

from __future__ import annotations

import os

from launcher.errors import RecipeError
from launcher.recipe.validation import brief


def check_quick_checkpoints(folder: str | None, every: int | None) -> None:
    """Refuse a folder without an interval, an interval without a folder, and a relative folder.

    Args:
        folder: The setting `quick_checkpoints`.
        every: The setting `quick_checkpoint_every`.

    Raises:
        RecipeError: One of the two is missing, or the folder depends on the working folder.
    """
    if folder is None and every is None:
        return
    if folder is None:
        raise RecipeError(
            f"quick_checkpoint_every={every} needs quick_checkpoints, a folder that each node has "
            "to itself, such as quick_checkpoints=/dev/shm/quick."
        )
    shown = f"quick_checkpoints={brief(folder)}"
    if every is None:
        raise RecipeError(
            f"{shown} needs quick_checkpoint_every, the steps from one quick checkpoint to the "
            "next, such as quick_checkpoint_every=50."
        )
    if not os.path.isabs(folder) or "\0" in folder:  # noqa: PTH117  # it is text, as in the recipe
        raise RecipeError(
            f"{shown} is a relative path, which may mean another folder on each node. Give the "
            "absolute path of a folder on a disk of the node, or in /dev/shm."
        )
