"""Initialise lazy layers, whose weights have no shape before the first batch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from launcher.engine.backends.recipe_forward import call_forward
from launcher.engine.data.randomness import Generators, seed_all
from launcher.engine.model.batch_norm import frozen
from launcher.errors import LauncherError, RecipeError
from launcher.printable import notes_of
from launcher.recipe.recipe import Recipe


def lazy_names(model: nn.Module) -> list[str]:
    """Return the names of parameters and buffers that have no shape yet."""
    named = (*model.named_parameters(), *model.named_buffers())
    return [name for name, tensor in named if is_lazy(tensor)]


def initialize_lazy_layers(model: nn.Module, recipe: Recipe, batch: Any) -> None:
    """Give lazy layers their shapes by a forward pass, with the same weights on every rank.

    The running statistics of BatchNorm and the global random generators are left as they were.

    Args:
        model: The recipe's model, on the CPU.
        recipe: The recipe, whose `forward` is called and whose seed is used.
        batch: A batch, on the CPU, the same on every rank.

    Raises:
        RecipeError: The forward pass failed, or left a layer without shape.
    """
    mode, generators = model.training, Generators()
    seed_all(recipe.seed)
    try:
        for training in (False, True):  # some models use a part of their layers in training only
            model.train(training)
            # In training, no running statistics exist before the layers have been initialised.
            with torch.no_grad(), frozen(model.modules()) if training else contextlib.nullcontext():
                call_forward(recipe.forward, model, batch)
            if not (names := lazy_names(model)):
                return
    except LauncherError:
        raise
    except Exception as error:
        raise RecipeError(
            f"The model has lazy layers, and a forward pass that was to initialise them raised "
            f"{type(error).__name__}: {error}. Give the layers their sizes, or call the model once "
            "in the recipe's model function." + "".join(f"\n{note}" for note in notes_of(error))
        ) from error
    finally:
        model.train(mode)
        generators.restore()
    raise RecipeError(
        f"The model's lazy layer with {names[0]} takes no part in forward, so its shape stays "
        "unknown. Give it its size, or remove it."
    )
