"""Errors about values that a recipe gives in place of data sets."""

from __future__ import annotations

from typing import Any

from launcher.errors import RecipeError
from launcher.printable import kind_of


def check_no_loader(name: str, data: Any) -> None:
    """Refuse an object that makes batches of a data set, such as torch's DataLoader.

    Its length is that of the batches, and it has shuffled and divided the samples already.

    Args:
        name: The argument of `Data` that has the value.
        data: The value.

    Raises:
        RecipeError: It has no `__getitem__`, and has a data set as an attribute.
    """
    if not hasattr(type(data), "__getitem__") and all(
        hasattr(data, attribute) for attribute in ("dataset", "batch_size", "collate_fn")
    ):
        raise RecipeError(
            f"Data({name}=...): expected a data set, found {kind_of(data)}. launcher makes the "
            "batches itself, because it divides each among the ranks. Give the data set of the "
            "loader, which is its attribute `dataset`, and its collate_fn, if you wrote one, as "
            "Data(collate=...). Its batch_size and num_workers are settings of the recipe."
        )
