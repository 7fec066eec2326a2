"""The data of a recipe: a call of its data function, its streams, and the lengths of its sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.engine.data.streams import ENDLESS, Stream, as_stream, read_all
from launcher.errors import RecipeError
from launcher.printable import error_line, kind_of
from launcher.recipe.evaluation_sets import split_of, title_of
from launcher.recipe.function_checks import note_call
from launcher.recipe.recipe import Data, Recipe


def call_data(recipe: Recipe) -> Data:
    """Call the recipe's data function and return its data.

    Training data that can only be read from its start is returned as a `Stream`. Such evaluation
    sets are read to their end, and returned as lists.

    Raises:
        RecipeError: The function did not return `launcher.Data`, or a `collate` is no function.
        SampleError: A stream raised an exception.
    """
    try:
        data = recipe.data()
    except Exception as error:
        note_call(error, "The recipe's data function")
        raise
    if not isinstance(data, Data):
        raise RecipeError(
            f"The recipe's data function returned {type(data).__name__}; expected "
            "launcher.Data(train=..., evaluation=...)."
        )
    for owner, collate in [
        ("Data", data.collate),
        *(("Evaluation", each.collate) for each in data.evaluation_sets().values()),
    ]:
        if not (collate is None or callable(collate)):
            raise RecipeError(
                f"{owner}(collate=...): expected a function from a list of samples to a batch, or "
                f"None, found {kind_of(collate)}."
            )
    return _with_streams(recipe, data)


def _with_streams(recipe: Recipe, data: Data) -> Data:
    """Return data whose streams are found: `Data.train` as a `Stream`, the others in memory."""
    held_out = {
        name: replace(each, data=read_all(stream, recipe.seed, title_of(split_of(name))))
        for name, each in data.evaluation_sets().items()
        if (stream := as_stream(each.data)) is not None
    }
    if held_out:
        sets = {**data.evaluation_sets(), **held_out}
        data = replace(data, evaluation=sets.get("", sets))
    stream = as_stream(data.train)
    return data if stream is None else replace(data, train=stream)


def with_first_samples(recipe: Recipe, data: Data, count: int) -> Data:
    """Return data in which a list of the first samples stands for a training stream."""
    if not isinstance(data.train, Stream):
        return data
    return replace(data, train=read_all(data.train, recipe.seed, "training", limit=count))


def sample_count(data: Any, split: str, train_samples: int | None = None) -> int:
    """Return the number of samples in a data set; of a stream, in one of its epochs.

    Args:
        data: The data set of a recipe.
        split: The name of the data set, for error messages.
        train_samples: The number that the recipe states, which is the length of a stream's epoch.

    Raises:
        RecipeError: The data set has no length, cannot be indexed, or is empty.
    """
    if isinstance(data, Stream):
        return train_samples or ENDLESS
    if isinstance(data, Mapping) and 0 not in data:
        names = ", ".join(map(repr, list(data)[:4]))
        raise RecipeError(
            f"The {split} data is {kind_of(data)} with the keys {names}, but it must be "
            "one data set whose samples have indices from 0. Join several data sets with "
            "torch.utils.data.ConcatDataset."
        )
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        missing = "length" if hasattr(data, "__getitem__") else "__getitem__"
        raise RecipeError(
            f"The {split} data is {kind_of(data)}, which has no {missing}, so its samples "
            "cannot be divided exactly among ranks. Return a map-style data set, with __len__ and "
            "__getitem__."
        )
    try:
        num_samples = len(data)
    except Exception as error:  # noqa: BLE001  # the recipe's code may raise anything
        raise RecipeError(
            f"The {split} data is {kind_of(data)}, whose length cannot be read: len() raised "
            f"{error_line(error)}. Its __len__ must return the number of samples."
        ) from None
    if num_samples == 0:
        raise RecipeError(
            f"The {split} data is empty: len() of the {type(data).__name__} is 0. "
            "Check what the recipe's data function reads."
        )
    return num_samples
