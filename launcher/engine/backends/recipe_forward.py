"""Runs a recipe's `forward` inside the forward pass of the module that a strategy wraps.

DistributedDataParallel, FSDP and DeepSpeed prepare a step in the forward pass of the module that
they wrap. If that module were the recipe's own, a recipe could only call it: its attributes would
be hidden, and its methods and submodules would compute outside the wrapped pass. They wrap a
`RecipeForward` instead, within which the recipe's `forward` receives its own module, as on one
rank: `model.num_classes`, `model.encode(x)` and `model.head(features)` work under every strategy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from launcher.engine.backends.nested_tensors import describe_argument, map_tensors, tensors_in
from launcher.errors import RecipeError
from launcher.printable import kind_of
from launcher.recipe.function_checks import note_call

_MODULE = "recipe_module"
"""The attribute of `RecipeForward` with the recipe's module."""

PREFIX = f"{_MODULE}."
"""The prefix of the names of modules and tensors inside a `RecipeForward`."""


class RecipeForward(nn.Module):
    """A module whose forward pass is a call of the recipe's `forward`.

    Args:
        module: The recipe's own module.
    """

    recipe_module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.recipe_module = module
        self.train(module.training)

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


class NamedRecipeForward(RecipeForward):
    """A `RecipeForward` that shows the attributes of the recipe's module.

    Accelerate shards the embeddings and the final norm of a Hugging Face model separately, and
    finds them by such attributes.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = super().__getattr__(_MODULE)
            if name == "base_model_prefix":  # the submodule whose children Accelerate searches
                return getattr(module, name, "") or _MODULE
            return getattr(module, name)


def call_forward(function: Callable[[Any, Any], Any], module: nn.Module, batch: Any) -> Any:
    """Return `function(module, batch)`; if it raises, note with what it was called."""
    try:
        return function(module, batch)
    except Exception as error:
        note_call(
            error,
            "The recipe's forward",
            model=type(module).__name__,
            batch=describe_argument(batch),
        )
        raise


def call_inside(
    wrapped: nn.Module, module: nn.Module, function: Callable[[Any, Any], Any], batch: Any
) -> Any:
    """Return `function(module, batch)`, called inside the forward pass of `wrapped`."""
    return wrapped(functools.partial(call_forward, function, module, batch))


def call_with_output_hooks(
    wrapped: nn.Module, module: nn.Module, function: Callable[[Any, Any], Any], batch: Any
) -> Any:
    """Return `function(module, batch)`, called inside the forward pass of `wrapped`.

    FSDP and DeepSpeed start their backward pass by hooks on the output tensors of that pass, so it
    returns them in a list, whatever containers the recipe's `forward` returns.

    Raises:
        RecipeError: The outputs contain no tensor with a gradient.
    """
    outputs: Any = None

    def call() -> Any:
        nonlocal outputs
        outputs = call_forward(function, module, batch)
        return outputs if isinstance(outputs, Tensor) else tensors_in(outputs)

    returned = wrapped(call)
    if isinstance(outputs, Tensor):
        return returned
    if torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in returned):
        raise RecipeError(
            f"The recipe's forward returned {kind_of(outputs)} in which no tensor with a "
            "gradient was found. Return a tensor, or tensors in a list, tuple, dict or dataclass."
        )
    tensors = iter(returned)
    return map_tensors(lambda _: next(tensors), outputs)
