"""What an object in `Recipe.callbacks` must have: hooks with known names, and a whole state."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from launcher.errors import RecipeError, did_you_mean
from launcher.printable import printable_line
from launcher.recipe.function_checks import check_function
from launcher.recipe.validation import brief, show

HOOKS = (
    "on_run_start",
    "before_step",
    "after_step",
    "on_evaluation",
    "on_checkpoint",
    "on_run_end",
)
"""The methods that a run calls, in the order of the first calls."""

_STATE = ("state_dict", "load_state_dict")

_LIKE_A_HOOK = re.compile(r"^(on|before|after)_")

_MAX_NAMED = 3

_AFTER_EPOCH = (
    "after_step, whose context.epoch is the epoch of the step, or on_evaluation, which follows "
    "each epoch unless evaluate_every is set"
)

_FOREIGN: Mapping[str, str] = MappingProxyType(
    {
        name: ours
        for ours, names in {
            "on_run_start": "on_train_start on_train_begin on_fit_start on_init_end on_start",
            "before_step": "on_step_begin on_step_start on_train_batch_start on_train_batch_begin "
            "on_batch_start on_batch_begin before_batch",
            "after_step": "on_step_end on_train_batch_end on_batch_end on_optimizer_step on_log "
            "after_batch",
            _AFTER_EPOCH: "on_epoch_end on_train_epoch_end after_epoch",
            "before_step, whose context.epoch is the epoch of the coming step": "on_epoch_begin "
            "on_epoch_start on_train_epoch_start before_epoch",
            "on_evaluation": "on_evaluate on_evaluation_end on_validation_end "
            "on_validation_epoch_end on_eval_end on_test_end on_test_epoch_end after_evaluation",
            "on_checkpoint": "on_save on_save_checkpoint on_checkpoint_saved after_checkpoint",
            "on_run_end": "on_train_end on_fit_end on_end after_run",
            "state_dict and load_state_dict": "on_load_checkpoint",
        }.items()
        for name in names.split()
    }
)
"""Hooks of other trainers, and what to write in their place."""


def check_callbacks(callbacks: Any) -> tuple[Any, ...]:
    """Return the callbacks of a recipe as a tuple.

    Raises:
        RecipeError: One of them is no object with hooks, has a method that looks like a hook and is
            none, or saves a state that it cannot load.
    """
    if not isinstance(callbacks, (list, tuple)):
        name = printable_line(type(callbacks).__name__)
        advice = f" Write callbacks=({name}(),)." if _hooks_of(callbacks) else ""
        raise RecipeError(
            f"Recipe(callbacks=...): expected a tuple of objects, found {show(callbacks)}.{advice}"
        )
    for callback in callbacks:
        _check_callback(callback)
    return tuple(callbacks)


def _check_callback(callback: Any) -> None:
    name = printable_line(getattr(callback, "__name__", type(callback).__name__))
    known = ", ".join(HOOKS)
    if isinstance(callback, type):
        raise RecipeError(
            f"Recipe(callbacks=...): found the class {name}; expected an object. Write {name}()."
        )
    _check_other_names(callback, name)
    hooks = _hooks_of(callback)
    if not hooks:
        raise RecipeError(
            f"Recipe(callbacks=...): found {brief(callback)}, which has none of the methods that a "
            f"run calls: {known}."
        )
    for hook in hooks:
        check_function(
            f"{name}.{hook} in Recipe(callbacks=...)", getattr(callback, hook), ("context",)
        )
    present = [method for method in _STATE if callable(getattr(callback, method, None))]
    if len(present) == 1:
        (missing,) = set(_STATE) - set(present)
        raise RecipeError(
            f"Recipe(callbacks=...): {name} has {present[0]} and no {missing}. A checkpoint holds "
            "what state_dict returns, and load_state_dict receives it in a resumed run: write both."
        )
    if present:
        place = f"{name}.{{}} in Recipe(callbacks=...)"
        check_function(place.format("state_dict"), callback.state_dict, ())
        check_function(place.format("load_state_dict"), callback.load_state_dict, ("state",))


def _check_other_names(callback: Any, name: str) -> None:
    """Refuse public methods that are named like hooks, which no run would call."""
    others = [
        method
        for method in dir(callback)
        if _LIKE_A_HOOK.match(method)
        and method not in HOOKS
        and callable(inspect.getattr_static(callback, method, None))
    ]
    if not others:
        return
    named = others[:_MAX_NAMED]
    more = f" and {len(others) - len(named)} more" if others[_MAX_NAMED:] else ""
    hints = "".join(
        f" In place of {method} write {_FOREIGN[method]}."
        if method in _FOREIGN
        else did_you_mean(method, HOOKS)
        for method in named
    )
    raise RecipeError(
        f"Recipe(callbacks=...): {name} has the methods {', '.join(named)}{more}, which no run "
        f"calls.{hints} A run calls {', '.join(HOOKS)}. Let the names of other methods begin with "
        "an underscore."
    )


def _hooks_of(callback: Any) -> list[str]:
    return [hook for hook in HOOKS if callable(getattr(callback, hook, None))]
