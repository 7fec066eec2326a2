"""Text from a recipe, a run folder or an exception, made safe to show on a terminal."""

from __future__ import annotations

import unicodedata

MAX_CHARACTERS = 20_000
"""Longest text of an exception that is recorded or shown; a longer one loses its middle."""

_SAFE = frozenset("\n\t")
_ESCAPED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of control and format characters, surrogates, and separators of lines."""


def printable(text: str) -> str:
    r"""Return `text` with every character that could command a terminal written as an escape.

    Control characters other than newline and tab, invisible format characters and lone surrogates
    become `\x1b`, `\u202e` or `\udce9`. The result can be encoded as UTF-8.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_escaped, text))


def printable_line(text: str) -> str:
    """Return `text` as `printable` does, on one line: newlines and tabs become spaces."""
    return printable(" ".join(text.split()))


def shortened(text: str, limit: int = MAX_CHARACTERS) -> str:
    """Return `text` with at most about `limit` characters: its beginning, its end and a count."""
    if len(text) <= limit:
        return text
    head, tail = text[: limit // 2], text[-(limit // 2) :]
    return f"{head}\n... {len(text) - len(head) - len(tail):,} characters left out ...\n{tail}"


def text_of(error: BaseException) -> str:
    """Return the text of an exception, shortened and printable, even if its `__str__` raises."""
    try:
        text = str(error)
    except BaseException as second:  # noqa: BLE001  # whatever the class of the exception raises
        return f"({type(second).__name__} was raised while the text of the exception was read)"
    return printable(shortened(text))


def _escaped(character: str) -> str:
    if character in _SAFE or unicodedata.category(character) not in _ESCAPED_CATEGORIES:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
