"""Text from a command line or a file, as numbers, truth values, lists and pairs.

Everything here is a function of its text alone, and runs no code of the text.
"""

from __future__ import annotations

import re
from typing import Any

_INTEGER = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_MAX_DIGITS = 400
"""Longest text of a number; the largest float has 309 digits."""

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_YAML_TYPES = ("null", "bool", "int", "float", "timestamp")
_CLOSING = {"[": "]", "(": ")", "{": "}"}


def digits(text: str) -> int | None:
    """Return the number that text of the digits 0 to 9 alone stands for; None for other text."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def whole_number(text: str) -> int | None:
    """Return the whole number that text such as `12`, `1_024` or `1e3` stands for, or None."""
    text = text.strip()
    if len(text) > _MAX_DIGITS:
        return None
    if _INTEGER.fullmatch(text):
        return int(text)
    value = number(text)
    return int(value) if value is not None and value.is_integer() else None


def number(text: str) -> float | None:
    """Return the number that text such as `.1`, `1e-3` or `1_000` stands for; None for other text.

    `inf` and `nan` are no numbers of a setting; text beyond the range of floats is None as well.
    """
    text = text.strip()
    if len(text) > _MAX_DIGITS or not re.fullmatch(r"[0-9.eE_+-]+", text):
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value not in (float("inf"), float("-inf")) else None


def truth(value: Any) -> bool | None:
    """Return what `true`, `yes`, `on`, 1 or their opposites stand for; None for other values."""
    word = str(value).strip().lower() if isinstance(value, (str, int)) else ""
    return True if word in _TRUE else False if word in _FALSE else None


def split_items(text: str) -> list[str]:
    """Return the items of a list, such as `a,b` or `[a, [b, c]]`.

    Commas within brackets or quotes belong to an item. Spaces around items are removed; an empty
    last item is not counted.

    Raises:
        ValueError: Brackets or quotes are not closed.
    """
    items = [piece.strip() for piece in _split(_without_brackets(text.strip()), ",")]
    return items if items[-1] else items[:-1]


def split_pair(text: str) -> tuple[str, str]:
    """Return the key and the value of an item of a mapping, such as `a: 1`.

    Raises:
        ValueError: The item has no colon, or brackets or quotes are not closed.
    """
    key, *rest = _split(text, ":")
    if not rest:
        raise ValueError("an item of a mapping is written `key: value`")
    return key.strip(), ":".join(rest).strip()


def without_quotes(text: str) -> str:
    """Return `text` without the pair of quotes around it, if there is one."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text


def yaml_value(text: str, depth: int) -> Any:
    """Return the value that `text` would have in a YAML file.

    Args:
        text: A scalar, a list in brackets or a mapping in braces.
        depth: Levels of brackets that may stand within each other.

    Raises:
        ValueError: Brackets or quotes are not closed or too deep, or a scalar has no value, such as
            a date that does not exist.
    """
    text = text.strip()
    if depth < 0:
        raise ValueError("brackets are nested too deep")
    if text[:1] == "[":
        return [yaml_value(item, depth - 1) for item in split_items(text)]
    if text[:1] == "{":
        pairs = [split_pair(item) for item in split_items(text)]
        return {yaml_scalar(key): yaml_value(item, depth - 1) for key, item in pairs}
    return yaml_scalar(text)


def yaml_scalar(text: str) -> Any:
    """Return the value that a scalar would have in a YAML file; quoted text is text.

    Raises:
        ValueError: The scalar has the form of a number or a date, and no value.
    """
    import yaml

    if (unquoted := without_quotes(text)) != text:
        return unquoted
    loader: Any = yaml.SafeLoader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        if tag.rpartition(":")[2] not in _YAML_TYPES:
            return text
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except (yaml.YAMLError, ValueError, ArithmeticError):
        raise ValueError("YAML reads it as a number or a date that does not exist") from None


def _split(text: str, separator: str) -> list[str]:
    """Return the pieces of `text` between separators that are outside of brackets and quotes.

    Raises:
        ValueError: Brackets or quotes are not closed.
    """
    starts, open_brackets, quote, last = [0], [], "", ""
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and last in ("", separator, *"[({,:"):
            quote = character
        elif character in _CLOSING:
            open_brackets.append(_CLOSING[character])
        elif open_brackets and character == open_brackets[-1]:
            open_brackets.pop()
        elif character == separator and not open_brackets:
            starts.append(position + 1)
        last = last if character.isspace() else character
    if open_brackets or quote:
        raise ValueError(f"a closing {(open_brackets or [quote])[-1]} is missing")
    ends = [start - 1 for start in starts[1:]] + [len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def _without_brackets(text: str) -> str:
    """Return `text` without the pair of brackets around it, if there is one."""
    closing = _CLOSING.get(text[:1])
    is_whole = closing is not None and text.endswith(closing) and len(_split(text, ",")) == 1
    return text[1:-1] if is_whole else text
