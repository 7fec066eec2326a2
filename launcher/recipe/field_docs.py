"""The sentence under each field of a dataclass, read from its source and added to its docstring.

Python drops the text below a field. `with_field_docs` restores it for `help()`, when someone asks:
reading the source takes longer than the rest of the import.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

C = TypeVar("C", bound=type)


@functools.cache
def sentences_of(dataclass: type) -> Mapping[str, str]:
    """Return the text under each field of a dataclass, by name, in declared order.

    Fields without a text are omitted; the result is empty if the source cannot be read.
    """
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(dataclass))).body
    except (OSError, SyntaxError, TypeError):
        return MappingProxyType({})
    assert isinstance(definition, ast.ClassDef)
    sentences = {}
    for statement, following in itertools.pairwise(definition.body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            sentences[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return MappingProxyType(sentences)


class _LazyDoc:
    """A docstring that ends with the fields of its class, composed when it is read."""

    def __init__(self, doc: str, dataclass: type) -> None:
        self._doc = doc
        self._dataclass = dataclass

    def __get__(self, instance: object, owner: type | None = None) -> str:
        fields = (
            textwrap.indent(f"{name}: {sentence}", "        ").removeprefix("    ")
            for name, sentence in sentences_of(self._dataclass).items()
        )
        return "\n".join([inspect.cleandoc(self._doc), "", "Attributes:", *fields])


def with_field_docs(dataclass: C) -> C:
    """Add the sentences under the fields of a dataclass to its docstring; a class decorator."""
    dataclass.__doc__ = _LazyDoc(dataclass.__doc__ or "", dataclass)  # type: ignore[assignment]
    return dataclass
