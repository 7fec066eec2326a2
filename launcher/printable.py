"""Text from a recipe, a run folder or an exception, made safe to show on a terminal."""

from __future__ import annotations

import contextlib
import os
import traceback
import unicodedata
from pathlib import Path

MAX_CHARACTERS = 20_000
"""Longest text of an exception that is recorded or shown; a longer one loses its middle."""

_MAX_ENTRY_CHARACTERS = 4_000
"""Longest entry of a traceback: the lines of one call, or the text of one exception."""

_MAX_NAME_CHARACTERS = 200

_PACKAGE = Path(__file__).parent
_STANDARD_LIBRARY = Path(os.__file__).parent

NOTE = "launcher: "
"""How a note begins that `add_note` has written."""
_TYPED = ("<stdin", "<python-input", "<ipython-input", "<cell ")
"""Beginnings of the names of code that was typed at a prompt, or into a cell of a notebook."""

_SAFE = frozenset("\n\t")
_ESCAPED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of control and format characters, surrogates, and separators of lines."""


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with every character that could command a terminal written as an escape.

    Control characters other than newline and tab, invisible format characters and lone surrogates
    become `\x1b`, `\u202e` or `\udce9`, unless they are in `keep`. The result can be encoded as
    UTF-8.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if character in keep else _escaped(character) for character in text)


def printable_line(text: str) -> str:
    """Return `text` as `printable` does, on one line: newlines and tabs become spaces."""
    return printable(" ".join(text.split()))


def as_unicode(text: str) -> str:
    """Return `text` without lone surrogates, which no text in UTF-8 can hold.

    Python reads file names and arguments with surrogates for bytes that the encoding of its locale
    lacks. Where these bytes are UTF-8 the result has their characters; otherwise it has escapes.
    """
    return as_bytes(text).decode("utf-8", "backslashreplace")


def as_bytes(text: str) -> bytes:
    """Return `text` in UTF-8, with the names of files as the bytes that they consist of.

    Other lone surrogates become escapes.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


def shortened(text: str, limit: int = MAX_CHARACTERS) -> str:
    """Return `text` with at most about `limit` characters: its beginning, its end and a count."""
    if len(text) <= limit:
        return text
    head, tail = text[: limit // 2], text[-(limit // 2) :]
    return f"{head}\n... {len(text) - len(head) - len(tail):,} characters left out ...\n{tail}"


def text_of(error: BaseException, limit: int = MAX_CHARACTERS) -> str:
    """Return the text of an exception, shortened and printable, even if its `__str__` raises."""
    try:
        text = str(error)
    except BaseException as second:  # noqa: BLE001  # whatever the class of the exception raises
        return f"({class_name(second)} was raised while the text of the exception was read)"
    return printable(shortened(text, limit))


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an exception about the call that raised it, unless it has one from launcher.

    Tracebacks end with the notes of their exception, and `noted_text_of` returns them.
    """
    with contextlib.suppress(Exception):  # an exception of a class of the user's may refuse it
        notes: list[str] = list(getattr(error, "__notes__", ()))
        if not any(other.startswith(NOTE) for other in notes):
            # As BaseException.add_note does, from Python 3.11 on.
            error.__notes__ = [*notes, NOTE + note]  # type: ignore[attr-defined]


def notes_of(error: BaseException) -> list[str]:
    """Return the notes of an exception, shortened and printable."""
    with contextlib.suppress(Exception):
        notes = getattr(error, "__notes__", ())
        return [printable(shortened(str(note), _MAX_ENTRY_CHARACTERS)) for note in notes]
    return []


def noted_text_of(error: BaseException, limit: int = MAX_CHARACTERS) -> str:
    """Return the text of an exception as `text_of` does, and its notes on further lines."""
    return "\n".join([text_of(error, limit), *notes_of(error)])


def kind_of(value: object) -> str:
    """Return the name of a value's class after `a` or `an`, as in `an IterableDataset`.

    The first letter decides, and U counts as a consonant, as in `a UserDict`.
    """
    name = type(value).__name__
    article = "an" if name.lower().startswith(("a", "e", "i", "o")) else "a"
    return f"{article} {printable_line(shortened(name, _MAX_NAME_CHARACTERS))}"


def class_name(error: BaseException) -> str:
    """Return the name of an exception's class, shortened and printable."""
    return printable_line(shortened(type(error).__name__, _MAX_NAME_CHARACTERS))


def error_line(error: BaseException) -> str:
    """Return the class and the text of an exception, as in `ValueError: no such file`.

    A text of several lines keeps them.
    """
    return f"{class_name(error)}: {text_of(error)}"


def traceback_of(error: BaseException, *, whole: bool = False) -> str:
    """Return the traceback of an exception, shortened and printable, even if its `__str__` raises.

    Each entry is shortened by itself, so that a long text of the exception does not displace the
    calls that led to it.

    Args:
        error: The exception.
        whole: Whether the traceback has all calls. Otherwise, if the error passed through code
            that is not installed, as recipes are not, the calls that led there are left out. If it
            did not, but a note names the function of the recipe that was called, as where that is
            a module of torch, the calls that led to this function are left out.
    """
    try:
        parts = traceback.TracebackException.from_exception(error)
        if not whole:
            _leave_out_calls_to_recipe(parts)
            if any(note.startswith(NOTE) for note in notes_of(error)):
                _leave_out_calls_to_library(parts)
        entries = list(parts.format())
        if not hasattr(parts, "__notes__"):  # before Python 3.11
            entries += [f"{note}\n" for note in notes_of(error)]
    except BaseException as second:  # noqa: BLE001  # whatever the class of the exception raises
        return f"{error_line(error)}\n({class_name(second)} was raised for its traceback)\n"
    text = "".join(shortened(entry, _MAX_ENTRY_CHARACTERS) for entry in entries)
    return printable(shortened(text))


def _leave_out_calls_to_recipe(parts: traceback.TracebackException) -> None:
    """Leave out the calls before the first one in a file that is not installed.

    The exceptions that caused this one lose theirs too. Where all calls are in installed files,
    they stay.
    """
    chain: list[traceback.TracebackException | None] = [parts]
    seen: set[int] = set()
    while chain:
        part = chain.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        places = [i for i, call in enumerate(part.stack) if is_recipe_file(call.filename)]
        if places:
            part.stack = traceback.StackSummary.from_list(part.stack[places[0] :])
        chain += [part.__cause__, part.__context__]


def _leave_out_calls_to_library(part: traceback.TracebackException) -> None:
    """Leave out the calls before the last one in a file of this package, if others follow it.

    Methods such as `__torch_dispatch__`, which torch calls for each operation, do not count.
    """
    places = [
        i
        for i, call in enumerate(part.stack)
        if _is_own_file(call.filename) and not call.name.startswith("__torch_")
    ]
    if places and places[-1] + 1 < len(part.stack):
        part.stack = traceback.StackSummary.from_list(part.stack[places[-1] :])


def _is_own_file(name: str) -> bool:
    """Return whether a file of code is of this package, and not one of its recipes."""
    path = Path(name)
    return path.is_relative_to(_PACKAGE) and not path.is_relative_to(_PACKAGE / "recipes")


def is_recipe_file(name: str) -> bool:
    """Return whether a file of code is neither of this package, of Python nor of a library."""
    if name.startswith("<"):
        return name.startswith(_TYPED)
    path = Path(name)
    if path.is_relative_to(_PACKAGE):
        return not _is_own_file(name)
    is_library = any(part.endswith("-packages") for part in path.parts)
    return not is_library and not path.is_relative_to(_STANDARD_LIBRARY)


def _escaped(character: str) -> str:
    if character in _SAFE or unicodedata.category(character) not in _ESCAPED_CATEGORIES:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
