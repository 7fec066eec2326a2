"""Values from outside a recipe; a YAML file overrides the recipe, the command line both.

An override names a parameter of the recipe function or, if the function has none of that name, a
setting of `Recipe`. Text is read by the type of what it names, so `lr=1e-3` and `lr: 1e-3` both
give a number.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from launcher.errors import (
    LauncherError,
    OverrideError,
    RecipeError,
    UsageError,
    did_you_mean,
    sentence,
)
from launcher.forking import observed_threads
from launcher.printable import printable_line
from launcher.recipe.callspec import parse
from launcher.recipe.catalogue import CALLS
from launcher.recipe.foreign_names import hint_for_unknown, hint_for_value
from launcher.recipe.parameter_types import named_parameters, plain_value, read_parameter
from launcher.recipe.parameters import check_given
from launcher.recipe.recipe import EXCLUSIVE, Recipe, setting_types
from launcher.recipe.resolve import Reference, user_code_error
from launcher.recipe.typed_values import Form
from launcher.recipe.validation import MismatchError, brief, convert
from launcher.yaml_file import read_yaml_file

COMMAND_LINE = "command line"
"""The source of an override that was given as an argument."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """A value from outside the recipe, for one of its parameters or settings."""

    name: str
    value: Any
    source: str
    """Where the value was given: `command line`, `Python`, `run.yaml`, or a YAML file and the line
    in it."""

    @property
    def origin(self) -> str:
        """Return the source, without the line if it is a file."""
        return self.source.rpartition(", line ")[0] or self.source

    def __str__(self) -> str:
        return f"{brief(self.name)}={brief(self.value)} ({printable_line(self.source)})"

    @property
    def form(self) -> Form:
        """Return how the value was given."""
        return "argument" if self.source == COMMAND_LINE else "text"


@dataclass(frozen=True, kw_only=True)
class BuiltRecipe:
    """A recipe with its overrides applied."""

    recipe: Recipe
    parameters: Mapping[str, Any]
    """The arguments that the recipe function was called with."""

    overrides: Mapping[str, Any]
    """The overridden values by name, after conversion to their types."""

    sources: Mapping[str, str]
    """Where each setting and parameter came from: `default`, `recipe`, or the source of its
    override."""


def read_arguments(arguments: Iterable[str]) -> tuple[Override, ...]:
    """Return the overrides that `name=value` arguments of a command line give.

    Raises:
        OverrideError: An argument has another form, or a name is given twice.
    """
    overrides: dict[str, Override] = {}
    arguments = tuple(arguments)
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not equals or not name:
            raise OverrideError(
                f"{brief(repr(argument))}: expected name=value, such as "
                f"{_joined(arguments, place) or 'lr=0.2'}."
            )
        if name in overrides:
            raise OverrideError(
                f"{brief(name)} is given twice: {brief(overrides[name].value)} and {brief(value)}. "
                "Keep one."
            )
        overrides[name] = Override(name=name, value=value, source=COMMAND_LINE)
    return tuple(overrides.values())


def _joined(arguments: Sequence[str], place: int) -> str:
    """Return `name=value` for an argument that spaces separate from the rest of it, or ``.

    Args:
        arguments: All arguments, such as `lr 0.1`, `lr = 0.1` or `lr= 0.1`.
        place: The place of the first that is no `name=value`.
    """
    before = arguments[place - 1] if place else ""
    if before.endswith("=") and before[:-1].isidentifier():
        return brief(shlex.quote(before + arguments[place]))
    name, *others = arguments[place : place + 3]
    value = "".join(others) if others and others[0] == "=" else others[0] if others else ""
    value = value.removeprefix("=")
    if not name.isidentifier() or not value or "=" in value:
        return ""
    return brief(shlex.quote(f"{name}={value}"))


def read_yaml(path: Path, *, as_text: bool = False) -> tuple[Override, ...]:
    """Return the overrides that a YAML file gives, as one mapping of names to values.

    Args:
        path: The file.
        as_text: Whether values stay text as written; YAML would read 12:00:00 as 43200.

    Raises:
        OverrideError: The file cannot be read or parsed, holds no mapping, or gives a name twice.
    """
    file = read_yaml_file(path, as_text=as_text)
    if file.value is None:
        return ()
    if not isinstance(file.value, dict):
        raise OverrideError(
            f"{path}: expected lines `name: value`, found a list or a single value."
        )
    return tuple(
        Override(name=str(name), value=value, source=f"{path}, line {file.lines.get(str(name), 1)}")
        for name, value in file.value.items()
    )


def build(reference: Reference, overrides: Sequence[Override] = ()) -> BuiltRecipe:
    """Call the recipe function and apply `overrides` to its result; later overrides win.

    Raises:
        OverrideError: A name is unknown, or a value does not fit its type or the other settings.
        RecipeError: The function raises, or does not return a Recipe.
    """
    known = named_parameters(reference.function)
    parameters, changes = {}, {}
    sources: dict[str, str] = {}
    for override in overrides:
        if override.name in known:
            parameters[override.name] = _read_parameter(reference, known[override.name], override)
        else:
            changes[override.name] = _read_setting(override, known, reference)
        sources[override.name] = override.source
    original = _call(reference, parameters)
    overridden = {override.name for override in overrides}
    for names in EXCLUSIVE:
        _clear_the_others(names, overrides, changes, sources)
    try:
        recipe = replace(original, **changes)
    except RecipeError as error:
        raise OverrideError(str(error)) from None
    for name in original.settings():
        if name not in overridden:
            is_default = getattr(original, name) == _default(name)
            sources.setdefault(name, "default" if is_default else "recipe")
    values = {
        name: plain_value(value)
        for name, value in (parameters | changes).items()
        if name in overridden
    }
    return BuiltRecipe(recipe=recipe, parameters=parameters, overrides=values, sources=sources)


def _default(name: str) -> Any:
    field = next(item for item in fields(Recipe) if item.name == name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def _read_parameter(reference: Reference, parameter: inspect.Parameter, override: Override) -> Any:
    """Return the value of a parameter of the recipe function.

    Raises:
        OverrideError: The value does not fit, or the type is one that no text stands for.
    """
    try:
        return read_parameter(reference.function, parameter, override.value, override.form)
    except (MismatchError, RecipeError) as error:
        raise OverrideError(f"{override}: {str(error).rstrip('.')}.") from None


def _choices(hint: Any) -> list[str]:
    """Return the words that a type of a setting allows, those of its parts included."""
    if get_origin(hint) is Literal:
        return [value for value in get_args(hint) if isinstance(value, str)]
    return [word for part in get_args(hint) for word in _choices(part)]


def _read_setting(override: Override, parameters: Mapping[str, Any], reference: Reference) -> Any:
    """Return the value of a setting of `Recipe`.

    Raises:
        OverrideError: The value does not fit, or there is no such setting.
    """
    types = setting_types()
    try:
        if override.name in CALLS:
            if _default(override.name) is None and override.value in (None, "none"):
                return None
            return parse(override.value, CALLS[override.name], kind=override.name)
        if override.name in types:
            return convert(override.value, types[override.name], override.form)
    except (MismatchError, UsageError) as error:
        text = sentence(str(error))
        hint = ""
        if "Did you mean" not in text:
            choices = _choices(types.get(override.name))
            hint = hint_for_value(override.name, override.value) or did_you_mean(
                str(override.value)[:100], choices
            )
        raise OverrideError(f"{override}: {text}{hint}") from None
    if override.name in {item.name for item in fields(Recipe)}:
        raise OverrideError(
            f"{override}: {override.name} is a function of the recipe and cannot be given as text. "
            "Change it in the recipe, or derive another recipe with dataclasses.replace."
        )
    function = f"{reference.name}() has the parameters {', '.join(parameters)}; "
    known = [*types, *CALLS, *parameters]
    hint = hint_for_unknown(override.name, known, override.value)
    raise OverrideError(
        f"{override}: there is no such setting.{hint}"
        f" {function if parameters else ''}`launcher settings` lists the settings."
    )


def _call(reference: Reference, parameters: Mapping[str, Any]) -> Recipe:
    check_given(reference.function, reference.shown, parameters)
    try:
        with observed_threads():
            recipe = reference.function(**parameters)
    except (LauncherError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise user_code_error("build", reference.shown, error) from error
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{reference.shown} returned {type(recipe).__name__}, not a Recipe. "
            "A recipe is a function that returns launcher.Recipe(...)."
        )
    return recipe


def _clear_the_others(
    names: tuple[str, ...],
    overrides: Sequence[Override],
    changes: dict[str, Any],
    sources: dict[str, str],
) -> None:
    """Set the other settings of an exclusive group to None if one of the group is overridden.

    Raises:
        OverrideError: Several have a value, given in the same place.
    """
    # A recipe may have a parameter of the same name, which is not among the changes.
    settings = [name for name in names if name in changes]
    given = [override for override in overrides if override.name in settings]
    if not given:
        return
    values = [override for override in given if changes[override.name] is not None]
    if len(values) > 1 and values[-1].origin == values[-2].origin:
        first, second = values[-2:]
        raise OverrideError(f"{first} and {second} exclude each other: keep one.")
    winner = (values or given)[-1].name
    for name in names:
        if name != winner:
            changes[name] = None
            sources[name] = f"replaced by {winner}"
