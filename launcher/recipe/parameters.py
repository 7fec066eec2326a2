"""The parameters of a recipe function, as its help shows them: type, default and meaning."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from launcher.errors import RecipeError, sentence
from launcher.printable import printable_line
from launcher.recipe.catalogue import written
from launcher.recipe.validation import describe

_ARGUMENTS = re.compile(r"^(Args|Arguments|Parameters|Keyword Args|Keyword Arguments):$")
_ENTRY = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")


@dataclass(frozen=True, kw_only=True)
class RecipeParameter:
    """A keyword parameter of a recipe function, described for readers."""

    name: str
    type_words: str
    """The type in words; empty if the parameter has no annotation."""

    default: str | None
    """The default as it is written on the command line; None if a value must be given."""

    sentence: str
    """What the docstring of the function says under `Args:`; empty if it says nothing."""


def parameters_of(function: Callable[..., Any]) -> list[RecipeParameter]:
    """Return the parameters that can be given to a recipe function as NAME=VALUE."""
    sentences = documented_arguments(inspect.getdoc(function) or "")
    hints = _hints(function)
    return [
        RecipeParameter(
            name=name,
            type_words=_words(hints.get(name, parameter.annotation)),
            default=None if parameter.default is parameter.empty else _default(parameter.default),
            sentence=sentences.get(name, ""),
        )
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]


def check_given(function: Callable[..., Any], shown: str, given: Iterable[str]) -> None:
    """Refuse to call a recipe function without a parameter that it needs.

    Args:
        function: The recipe function.
        shown: Its location, for the message.
        given: Names of the parameters that have a value.

    Raises:
        RecipeError: A required parameter has no value; the message describes it.
    """
    given = set(given)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise RecipeError(
                f"{shown}: the parameter {parameter.name!r} stands before a `/`, so that it cannot "
                "be given by its name. Make it a keyword parameter."
            )
    missing = [
        parameter
        for parameter in parameters_of(function)
        if parameter.default is None and parameter.name not in given
    ]
    if not missing:
        return
    needed = " and ".join(f"{parameter.name}=..." for parameter in missing)
    details = "".join(map(_detail, missing))
    raise RecipeError(f"{function.__name__}() needs {needed} ({shown}).{details}")


def documented_arguments(doc: str) -> dict[str, str]:
    """Return the text of each argument in a docstring of Google's style, by name.

    Args:
        doc: The docstring, without common indentation.
    """
    texts: dict[str, list[str]] = {}
    lines = iter(doc.splitlines())
    for line in lines:
        if _ARGUMENTS.match(line.strip()):
            break
    indent, name = None, ""
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if not line.strip():
            continue
        indent = depth if indent is None else indent
        if depth < indent or depth == 0:
            break
        entry = _ENTRY.match(line.strip()) if depth == indent else None
        if entry is not None:
            name = entry[1]
            texts[name] = [entry[2]]
        elif name:
            texts[name].append(line.strip())
    return {name: printable_line(" ".join(pieces)) for name, pieces in texts.items()}


def names_in_source(path: Path, function: str) -> list[str]:
    """Return the names of the parameters of a function in a file, which is not imported.

    Args:
        path: The file.
        function: The function; empty takes the one with the name of the file, or else the first
            that is annotated `-> Recipe`.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    recipes = [name for name, node in functions.items() if returns_recipe(node)]
    wanted = [function] if function else [path.stem, *recipes]
    node = next((functions[name] for name in wanted if name in functions), None)
    if node is None:
        return []
    return [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]


def returns_recipe(node: ast.FunctionDef) -> bool:
    """Return whether a function in a syntax tree is annotated `-> Recipe`."""
    returns = ast.unparse(node.returns) if node.returns else ""
    return returns.strip("'\"").split(".")[-1] == "Recipe"


def _detail(parameter: RecipeParameter) -> str:
    parts = [part for part in (parameter.type_words, parameter.sentence) if part]
    description = f"{parameter.name} is {': '.join(parts)}"
    return f" {sentence(description)}" if parts else ""


def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except Exception:  # noqa: BLE001  # an annotation may name what only a type checker imports
        return {}


def _words(hint: Any) -> str:
    if hint is inspect.Parameter.empty or hint is Any:
        return ""
    if isinstance(hint, str):
        return hint
    return describe(hint)


def _default(value: Any) -> str:
    return printable_line(written(value)) or "''"
