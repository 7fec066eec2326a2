"""A function by name together with its arguments, as a value that can be printed and read back.

`one_cycle(div_factor=25)` in a recipe, in a YAML file and on the command line is the same text and
makes the same `Spec`. Reading one never runs code: the text is parsed, not evaluated.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from launcher.errors import UsageError, did_you_mean
from launcher.recipe.validation import MismatchError, convert

_WORDS = {"true": True, "false": False, "none": None}
"""As they are written in YAML and on the command line; Python's own are read as well."""


@dataclass(frozen=True)
class Spec:
    """A function and the keyword arguments it was given; equal when both are."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()
    function: Callable[..., Any] = field(repr=False, compare=False, default=lambda: None)

    def __str__(self) -> str:
        """The text that `parse` reads back: `cosine(final_factor=0.1)`."""
        inner = ", ".join(
            f"{name}={value}" if isinstance(value, Spec) else f"{name}={value!r}"
            for name, value in self.arguments
        )
        return f"{self.name}({inner})"

    def __repr__(self) -> str:
        return str(self)


def bind(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, skip: int = 0
) -> tuple[tuple[str, Any], ...]:
    """Check the arguments of a call against the signature of `function`, in its order.

    Args:
        function: Its parameters after the first `skip` are what may be given.
        args: Arguments by position.
        kwargs: Arguments by name.
        skip: Number of leading parameters that are filled in when the function runs.

    Raises:
        UsageError: A name is unknown, a value has the wrong type, or one is missing.
    """
    parameters = dict(list(inspect.signature(function).parameters.items())[skip:])
    given = dict(zip(parameters, args, strict=False)) | dict(kwargs)
    hints = get_type_hints(function, include_extras=True)
    call = function.__name__
    for name in given:
        if name not in parameters:
            raise UsageError(
                f"{call}() takes no {name!r}; it takes {', '.join(parameters) or 'nothing'}."
                + did_you_mean(name, parameters)
            )
    bound = []
    for name, parameter in parameters.items():
        if name not in given:
            if parameter.default is parameter.empty:
                raise UsageError(f"{call}() needs {name}=...")
            continue
        value = given[name]
        if not isinstance(value, Spec):
            try:
                value = convert(value, hints.get(name, Any))
            except MismatchError as error:
                raise UsageError(f"{call}({name}=...): {error}") from None
        bound.append((name, value))
    return tuple(bound)


def parse(text: str, table: Mapping[str, Callable[..., Spec]], *, kind: str) -> Spec:
    """Read `name` or `name(argument=value, ...)`, where `table` holds the known names.

    Raises:
        UsageError: The text is of another form, or names something that is not in the table.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise _unreadable(text, table, kind) from None
    return _read(tree, text, table, kind)


def _read(node: ast.expr, text: str, table: Mapping[str, Callable[..., Spec]], kind: str) -> Spec:
    called = node.func if isinstance(node, ast.Call) else node
    if not isinstance(called, ast.Name):
        raise _unreadable(text, table, kind)
    if called.id not in table:
        raise UsageError(
            f"there is no {kind} {called.id!r}; known: {', '.join(sorted(table))}."
            + did_you_mean(called.id, table)
        )
    factory = table[called.id]
    if not isinstance(node, ast.Call):
        return factory()
    names = list(inspect.signature(factory).parameters)
    if len(node.args) > len(names) or any(keyword.arg is None for keyword in node.keywords):
        raise _unreadable(text, table, kind)
    given = [*zip(names, node.args, strict=False)]
    given += [(keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg]
    arguments: dict[str, Any] = {}
    for name, value in given:
        if isinstance(value, ast.Name) and value.id in _WORDS:
            arguments[name] = _WORDS[value.id]
            continue
        try:
            arguments[name] = ast.literal_eval(value)
        except ValueError:
            arguments[name] = _read(value, text, table, kind)
    return factory(**arguments)


def _unreadable(text: str, table: Mapping[str, Any], kind: str) -> UsageError:
    return UsageError(
        f"{text!r} is no {kind}: write NAME or NAME(argument=value), with a NAME of "
        f"{', '.join(sorted(table))}."
    )
