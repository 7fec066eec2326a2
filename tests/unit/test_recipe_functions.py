"""A function that launcher could not call is refused when the recipe is made."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from launcher import Recipe, RecipeError, one_cycle
from launcher.recipes.digits import digits


def loss(outputs: Any, batch: Any) -> tuple[Any, int]:
    """Take what a loss is called with."""
    return outputs.sum(), len(batch)


def weighted_loss(outputs: Any, batch: Any, *, weight: float) -> tuple[Any, int]:
    """Need another argument than a loss is called with."""
    return weight * outputs.sum(), len(batch)


def scaled_forward(model: Any, batch: Any, scale: float = 1.0) -> Any:
    """Take another argument than `forward` is called with, and do not need it."""
    return scale * model(batch)


BAD: list[dict[str, Any]] = [
    {"model": torch.nn.Linear},
    {"model": torch.nn.Linear(2, 2)},
    {"data": lambda path: path},
    {"forward": len},
    {"loss": lambda outputs: outputs},
    {"loss": weighted_loss},
    {"optimizer": torch.optim.SGD},
    {"optimizer": lambda model: model},
    {"metrics": [loss]},
    {"metrics": {"accuracy": "accuracy"}},
    {"metrics": {"accuracy": lambda outputs: outputs}},
    {"metrics": {3: loss}},
    {"metrics": {"": loss}},
    {"metrics": {"two\nlines": loss}},
    {"metrics": {"loss": loss}},
]


@pytest.mark.parametrize("change", BAD)
def test_a_function_that_cannot_be_called_is_refused(change: dict[str, Any]) -> None:
    """The field is named where its value takes other arguments, or is no function."""
    [name] = change
    with pytest.raises(RecipeError) as caught:
        replace(digits(), **change)
    assert str(caught.value).startswith(f"Recipe({name}=")


@pytest.mark.parametrize(
    ("value", "fragment"),
    [
        (one_cycle, "one_cycle()"),
        (scaled_forward, "launcher.schedule"),
        ([1, 2], "a list"),
    ],
)
def test_what_is_no_schedule_is_refused(value: Any, fragment: str) -> None:
    """A maker that is not called and a plain function are refused with what to write."""
    with pytest.raises(RecipeError) as caught:
        replace(digits(), schedule=value)
    assert fragment in str(caught.value).partition("found")[2]
    assert "0x" not in str(caught.value)


class Model(torch.nn.Module):
    """A model whose class takes no arguments."""


@pytest.mark.parametrize(
    "change",
    [
        {"model": Model},
        {"loss": functools.partial(loss)},
        {"loss": max},
        {"loss": lambda *arguments: arguments},
        {"forward": scaled_forward},
        {"metrics": {"mean absolute error": loss}},
    ],
)
def test_other_functions_are_taken(change: dict[str, Any]) -> None:
    """Classes, partial functions and functions of further optional arguments are taken."""
    assert isinstance(replace(digits(), **change), Recipe)
