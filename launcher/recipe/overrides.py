"""Values from outside a recipe: recipe < YAML file < command line.

An override names a parameter of the recipe function or, where it has none of that name, a field of
`Recipe`. Text is read by the type of what it names, so `lr=1e-3` and `lr: 1e-3` are both a number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from launcher.errors import LauncherError, OverrideError, RecipeError, UsageError, did_you_mean
from launcher.forking import observed_threads
from launcher.recipe.callspec import Spec, parse
from launcher.recipe.optimizer import OPTIMIZERS
from launcher.recipe.recipe import EXCLUSIVE, Recipe, setting_types
from launcher.recipe.resolve import Reference, cannot
from launcher.recipe.schedules import SCHEDULES
from launcher.recipe.validation import MismatchError, convert

COMMAND_LINE = "command line"


@dataclass(frozen=True, kw_only=True)
class Override:
    """One value from outside the recipe."""

    name: str
    value: Any
    source: str
    """`command line`, or the name and line of a YAML file."""

    @property
    def origin(self) -> str:
        """The source, of a file without the line."""
        return self.source.rpartition(", line ")[0] or self.source

    def __str__(self) -> str:
        return f"{self.name}={self.value} ({self.source})"


@dataclass(frozen=True, kw_only=True)
class BuiltRecipe:
    """A recipe with its overrides applied."""

    recipe: Recipe
    parameters: Mapping[str, Any]
    """What the recipe function was called with."""

    overrides: Mapping[str, Any]
    """Every value from outside, as it was read."""

    sources: Mapping[str, str]
    """Where each setting and parameter came from: default, recipe, a YAML file, command line."""


def read_arguments(arguments: Iterable[str]) -> tuple[Override, ...]:
    """Read `name=value` arguments of a command line.

    Raises:
        OverrideError: An argument is not of that form, or a name is given twice.
    """
    read: dict[str, Override] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name:
            raise OverrideError(f"{argument!r}: expected name=value, such as lr=0.2.")
        if name in read:
            raise OverrideError(f"{name} is given twice: {read[name].value} and {value}. Keep one.")
        read[name] = Override(name=name, value=value, source=COMMAND_LINE)
    return tuple(read.values())


def read_yaml(path: Path, *, as_text: bool = False) -> tuple[Override, ...]:
    """Read a YAML file that holds one mapping of names to values.

    Args:
        path: The file.
        as_text: Whether values are left as they are written: YAML takes 12:00:00 for 43200.

    Raises:
        OverrideError: The file cannot be read, does not parse, or holds something else.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loader = yaml.BaseLoader if as_text else yaml.SafeLoader
        values = yaml.load(text, Loader=loader)  # noqa: S506  # neither makes objects
    except OSError as error:
        raise OverrideError(f"Cannot read {path}: {error.strerror}.") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise OverrideError(f"{path}{line}: not YAML: {error.problem}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OverrideError(f"{path}: not YAML: {error}.") from None
    if node is None:
        return ()
    if not isinstance(node, yaml.MappingNode):
        raise OverrideError(
            f"{path}: expected lines of `name: value`, found a list or a single value."
        )
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            raise OverrideError(
                f"{path}, line {line}: {key.value} is given a second time, after line "
                f"{lines[key.value]}. Keep one."
            )
        lines[key.value] = line
    return tuple(
        Override(name=str(name), value=value, source=f"{path}, line {lines.get(str(name), 1)}")
        for name, value in values.items()
    )


def build(reference: Reference, overrides: Sequence[Override] = ()) -> BuiltRecipe:
    """Call the recipe function and apply `overrides` to it, the later the stronger.

    Raises:
        OverrideError: A name is unknown, or a value does not fit it.
        RecipeError: The function raises, or returns no Recipe.
    """
    known = inspect.signature(reference.function).parameters
    parameters, changes = {}, {}
    sources: dict[str, str] = {}
    for override in overrides:
        if override.name in known:
            parameters[override.name] = _parameter(reference.function, override)
        else:
            changes[override.name] = _field(override, known, reference)
        sources[override.name] = override.source
    recipe = _call(reference, parameters)
    given = {override.name for override in overrides}
    for pair in EXCLUSIVE:
        _take_the_place(pair, overrides, changes, sources)
    try:
        built = replace(recipe, **changes)
    except RecipeError as error:
        raise OverrideError(str(error)) from None
    for name in recipe.settings():
        if name not in given:
            same = getattr(recipe, name) == _default(name)
            sources.setdefault(name, "default" if same else "recipe")
    values = {
        name: str(value) if isinstance(value, (Spec, Path)) else value
        for name, value in (parameters | changes).items()
        if name in given
    }
    return BuiltRecipe(recipe=built, parameters=parameters, overrides=values, sources=sources)


def _default(name: str) -> Any:
    field = next(item for item in fields(Recipe) if item.name == name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def _parameter(function: Callable[..., Recipe], override: Override) -> Any:
    hint = get_type_hints(function, include_extras=True).get(override.name, Any)
    text = str(override.value)
    if hint is Path or (Path in get_args(hint) and text.lower() not in ("none", "null")):
        return Path(text).expanduser()
    try:
        return convert(override.value, hint, from_text=True)
    except MismatchError as error:
        raise OverrideError(f"{override}: {error}.") from None


def _field(override: Override, parameters: Mapping[str, Any], reference: Reference) -> Any:
    types = setting_types()
    tables: dict[str, Mapping[str, Any]] = {"schedule": SCHEDULES, "optimizer": OPTIMIZERS}
    try:
        if override.name in tables:
            return parse(str(override.value), tables[override.name], kind=override.name)
        if override.name in types:
            return convert(override.value, types[override.name], from_text=True)
    except (MismatchError, UsageError) as error:
        raise OverrideError(f"{override}: {str(error).rstrip('.')}.") from None
    if override.name in {item.name for item in fields(Recipe)}:
        raise OverrideError(
            f"{override}: {override.name} is a function of the recipe and cannot be given as text. "
            "Change it in the recipe, or derive another with dataclasses.replace."
        )
    own = f"{reference.function.__name__}() has the parameters {', '.join(parameters)}; "
    raise OverrideError(
        f"{override}: there is no such setting."
        + did_you_mean(override.name, [*types, *tables, *parameters])
        + f" {own if parameters else ''}`launcher run --help` lists the settings."
    )


def _call(reference: Reference, parameters: Mapping[str, Any]) -> Recipe:
    try:
        with observed_threads():
            recipe = reference.function(**parameters)
    except LauncherError:
        raise
    except Exception as error:
        raise cannot("build", reference.shown, error) from error
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{reference.shown} returned {type(recipe).__name__}, not a Recipe. "
            "A recipe is a function that returns launcher.Recipe(...)."
        )
    return recipe


def _take_the_place(
    pair: tuple[str, str],
    overrides: Sequence[Override],
    changes: dict[str, Any],
    sources: dict[str, str],
) -> None:
    """Let the stronger override of an exclusive pair clear the other field."""
    given = [override for override in overrides if override.name in pair]
    if not given:
        return
    if len(given) == 2 and len({override.origin for override in given}) == 1:
        raise OverrideError(f"{given[0]} and {given[1]} exclude each other: keep one.")
    winner = given[-1].name
    other = pair[0] if winner == pair[1] else pair[1]
    changes[other] = None
    sources[other] = f"replaced by {winner}"
