"""Text from outside, made safe to show on a terminal."""

from __future__ import annotations

import json
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.printable import (
    MAX_CHARACTERS,
    add_note,
    error_line,
    kind_of,
    printable,
    printable_line,
    shortened,
    text_of,
    traceback_of,
)


class MuteError(Exception):
    """An exception without words."""

    def __str__(self) -> str:
        raise SystemExit("no words")

    __repr__ = __str__


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("café 日本", "café 日本"),
        ("\x1b[2J\x1b]0;owned\x07", "\\x1b[2J\\x1b]0;owned\\x07"),
        ("caf\udce9.jpg", "caf\\udce9.jpg"),
        ("a\rb\x00\x7f\x9b", "a\\rb\\x00\\x7f\\x9b"),
        ("\u202egpj\u2028", "\\u202egpj\\u2028"),
    ],
)
def test_control_characters_are_escaped(text: str, expected: str) -> None:
    """Control characters and surrogates become escapes; other text, in any script, stays."""
    assert printable(text) == expected
    assert printable(expected) == expected
    printable(text).encode()


def test_a_line_has_no_line_breaks() -> None:
    """Newlines and tabs become spaces."""
    assert printable_line("a\n b\tc\x1b") == "a b c\\x1b"


def test_a_long_text_loses_its_middle() -> None:
    """The beginning and the end stay, and the number of characters in between is named."""
    text = shortened("a" * 100 + "b" * 100, limit=20)
    assert text == f"{'a' * 10}\n... 180 characters left out ...\n{'b' * 10}"
    assert shortened("short", limit=20) == "short"


def test_a_class_has_its_article() -> None:
    """The name of a class stands after the article that its first letter asks for."""
    values: list[object] = [1, {}, UserDict()]
    assert [kind_of(value) for value in values] == ["an int", "a dict", "a UserDict"]


def test_an_exception_without_words_has_a_text() -> None:
    """An exception whose `__str__` raises is named by its class."""
    assert "SystemExit" in text_of(MuteError())
    assert error_line(MuteError()).startswith("MuteError: ")
    assert "MuteError" in traceback_of(MuteError())


def test_a_traceback_keeps_its_calls() -> None:
    """A message of 10 MB is shortened, and the calls above it stay."""

    def fail() -> None:
        raise ValueError("x\x1b" * 5_000_000)

    with pytest.raises(ValueError) as raised:  # noqa: PT011
        fail()
    text = traceback_of(raised.value)
    assert "in fail" in text
    assert "ValueError: x" in text
    assert "\x1b" not in text
    assert len(text) < 4 * MAX_CHARACTERS
    assert len(text_of(raised.value)) < 4 * MAX_CHARACTERS


def _raised_through(files: list[str], names: dict[int, str] | None = None) -> ValueError:
    """Return an exception that passed through one call in each of the files, outermost first.

    Args:
        files: The files.
        names: Names of the functions that are called, by their places; others are called `call`.
    """
    function: Callable[[], None] | None = None
    for place, file in reversed(list(enumerate(files))):
        name = (names or {}).get(place, "call")
        body = "raise ValueError" if function is None else "function()"
        scope: dict[str, Any] = {"function": function}
        exec(compile(f"def {name}():\n    {body}\n", file, "exec"), scope)
        function = scope[name]
    assert function is not None
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        function()
    return raised.value.with_traceback(raised.tb.tb_next)


def test_a_traceback_begins_in_the_recipe() -> None:
    """Calls in installed files are left out before the first call of a recipe, also of a cause."""
    files = [json.__file__, launcher.__file__, "/mine.py", json.__file__, "/mine.py"]
    error = _raised_through(files)
    assert traceback_of(error).count("  File ") == 3
    assert traceback_of(error, whole=True).count("  File ") == 5
    error.__cause__ = _raised_through(files[1:])
    assert traceback_of(error).count("  File ") == 6
    assert traceback_of(_raised_through(files[:2])).count("  File ") == 2
    recipe = str(Path(launcher.__file__).parent / "recipes" / "digits.py")
    assert traceback_of(_raised_through([launcher.__file__, recipe])).count("  File ") == 1


def test_a_noted_traceback_begins_at_the_call_of_the_recipe() -> None:
    """Where a library alone was called, a note that names this call leaves out those before it."""
    error = _raised_through([json.__file__, launcher.__file__, launcher.__file__, json.__file__])
    assert traceback_of(error).count("  File ") == 4
    add_note(error, "The recipe's forward was called with (batch: Tensor).")
    assert traceback_of(error).count("  File ") == 2
    assert traceback_of(error, whole=True).count("  File ") == 4
    files = [launcher.__file__, json.__file__, launcher.__file__, json.__file__]
    dispatched = _raised_through(files, {2: "__torch_dispatch__"})
    add_note(dispatched, "The recipe's forward was called with (batch: Tensor).")
    assert traceback_of(dispatched).count("  File ") == 4
    ours = _raised_through([json.__file__, launcher.__file__])
    add_note(ours, "The recipe's forward was called with (batch: Tensor).")
    assert traceback_of(ours).count("  File ") == 2
