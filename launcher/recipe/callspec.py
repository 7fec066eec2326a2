"""`Spec`: a function's name with its arguments, as a value that prints as the call and reads back.

`one_cycle(div_factor=25)` is the same text in a recipe, in a YAML file and on the command line, and
makes the same `Spec`. Reading one runs no code: the text is parsed, not evaluated.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_type_hints

from launcher.errors import UsageError, did_you_mean
from launcher.recipe.foreign_names import hint_for_unknown
from launcher.recipe.typed_values import UnsupportedTypeError
from launcher.recipe.validation import MismatchError, brief, convert

_MAX_LENGTH = 10_000
"""Characters of the longest spec that is read."""

_UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)
"""What Python raises for text that is no expression or no literal, such as {[]: 1}."""

_OWN_SETTING = " The learning rate is a setting of its own: lr=..."

_CONSTANTS = {"true": True, "false": False, "none": None}
"""Constants as YAML and the command line spell them; Python's own spellings are read as well."""


@dataclass(frozen=True)
class Spec:
    """A function and its keyword arguments. Two specs are equal if name and arguments are."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()
    function: Callable[..., Any] = field(repr=False, compare=False, default=lambda: None)

    example: ClassVar[str] = "name()"
    """A spec of this type as text, for messages."""

    def __str__(self) -> str:
        """Return the text that `parse` reads back, such as `cosine(final_factor=0.1)`."""
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
    """Return the arguments of a call by name, checked and in the order of the signature.

    Args:
        function: The function whose signature and type hints the arguments must match.
        args: The positional arguments.
        kwargs: The keyword arguments.
        skip: Number of leading parameters that are filled in when the function runs, and cannot be
            given here.

    Raises:
        UsageError: A name is unknown, a value has the wrong type, or an argument is missing.
    """
    parameters = dict(list(inspect.signature(function).parameters.items())[skip:])
    call = function.__name__
    positional = dict(zip(parameters, args, strict=False))
    if len(args) > len(parameters) or positional.keys() & kwargs.keys():
        raise UsageError(
            f"{call}() takes each of {', '.join(parameters) or 'no arguments'} once, and "
            f"{len(args) + len(kwargs)} arguments were given."
        )
    arguments = positional | dict(kwargs)
    hints = get_type_hints(function, include_extras=True)
    for name in arguments:
        if name not in parameters:
            raise UsageError(
                f"{call}() takes no {name!r}; it takes {', '.join(parameters) or 'nothing'}."
                + (_OWN_SETTING if name == "lr" else hint_for_unknown(name, parameters))
            )
    bound = []
    for name, parameter in parameters.items():
        if name not in arguments:
            if parameter.default is parameter.empty:
                raise UsageError(f"{call}() needs {name}=...")
            continue
        bound.append((name, _bound_value(call, name, arguments[name], hints.get(name, Any))))
    return tuple(bound)


def _bound_value(call: str, name: str, value: Any, hint: Any) -> Any:
    """Return the value of an argument, as an instance of its type.

    Raises:
        UsageError: It does not fit the type.
    """
    if hint is Any:
        return value
    if _is_spec(hint):
        if isinstance(value, hint):
            return value
        raise UsageError(
            f"{call}({name}={brief(repr(value))}): expected a {hint.__name__.lower()} such as "
            f"{hint.example}"
        )
    try:
        return convert(value, hint)
    except MismatchError as error:
        raise UsageError(f"{call}({name}=...): {error}") from None
    except UnsupportedTypeError:
        return value  # a rule of the user may take arguments that only Python gives


def _is_spec(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Spec)


def parse(value: object, table: Mapping[str, Callable[..., Spec]], *, kind: str) -> Spec:
    """Return the spec that `name` or `name(argument=value, ...)` describes.

    Args:
        value: The text to read, or a spec.
        table: The functions that make specs, by name.
        kind: What the specs are, such as `schedule`, for messages.

    Raises:
        UsageError: The text has another form, or names something that is not in the table.
    """
    text = str(value) if isinstance(value, (str, Spec)) else brief(value)
    if len(text) > _MAX_LENGTH:
        raise _unreadable(text, table, kind)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of texts such as 1if
            tree = ast.parse(text.strip(), mode="eval").body
    except _UNREADABLE:
        raise _unreadable(text, table, kind) from None
    return _read_call(tree, text, table, kind)


def _read_call(
    node: ast.expr, text: str, table: Mapping[str, Callable[..., Spec]], kind: str
) -> Spec:
    called = node.func if isinstance(node, ast.Call) else node
    if not isinstance(called, ast.Name):
        raise _unreadable(text, table, kind)
    if called.id not in table:
        raise UsageError(
            f"there is no {kind} {brief(repr(called.id))}; known: {', '.join(sorted(table))}."
            + did_you_mean(called.id, table)
        )
    factory = table[called.id]
    if not isinstance(node, ast.Call):
        return factory()
    parameters = list(inspect.signature(factory).parameters)
    if len(node.args) > len(parameters) or any(keyword.arg is None for keyword in node.keywords):
        raise _unreadable(text, table, kind)
    pairs = [*zip(parameters, node.args, strict=False)]
    pairs += [(keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg]
    hints = get_type_hints(factory)
    arguments: dict[str, Any] = {}
    for name, value in pairs:
        if name in arguments:
            raise UsageError(f"{called.id}(): {name} is given twice; keep one.")
        takes_spec = _is_spec(hints.get(name))
        arguments[name] = _read_value(value, text, table, kind, takes_spec=takes_spec)
    return factory(**arguments)


def _read_value(
    node: ast.expr,
    text: str,
    table: Mapping[str, Callable[..., Spec]],
    kind: str,
    *,
    takes_spec: bool,
) -> Any:
    """Return an argument: a literal, a constant, a call, a text without quotes, or a list of these.

    A word in a list names a spec if there is one of this name.
    """
    if isinstance(node, ast.Name) and (node.id in _CONSTANTS or not takes_spec):
        return _CONSTANTS.get(node.id, node.id)
    try:
        return ast.literal_eval(node)
    except _UNREADABLE:
        if not isinstance(node, ast.List):
            return _read_call(node, text, table, kind)
    names_spec = [isinstance(item, ast.Name) and item.id in table for item in node.elts]
    return [
        _read_value(item, text, table, kind, takes_spec=is_name)
        for item, is_name in zip(node.elts, names_spec, strict=True)
    ]


def _unreadable(text: str, table: Mapping[str, Any], kind: str) -> UsageError:
    return UsageError(
        f"expected NAME or NAME(argument=value), where NAME is a known {kind} "
        f"({', '.join(sorted(table))}); found {brief(repr(text))}."
    )
