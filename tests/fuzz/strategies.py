"""Hypothesis strategies for what users, disks and networks may hand to a command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

_NASTY = [
    "",
    " ",
    "-",
    "--",
    "=",
    ".",
    "..",
    "/",
    "~",
    "\t",
    "\n",
    "\\",
    "%",
    "%s",
    "{}",
    "'",
    '"',
    "²",
    "٣",
    "½",
    "Ⅷ",
    "\udce9",
    "caf\udce9.jpg",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202egnp.exe",
    "a" * 300,
    "a/" * 3000,
    "9" * 400,
    "9" * 5000,
    "-" * 3000 + "1",
    "[" * 1000,
    "(" * 1000,
    "1e400",
    "-1e400",
    "nan",
    "inf",
    "-inf",
    "1e-400",
    "0x10",
    "1_000",
    ".1",
    "1.",
    "+1",
    "1,2",
    "[1, 2]",
    "{1: 2}",
    "none",
    "null",
    "true",
    "/dev/zero",
    "/dev/full",
    "/dev/null",
    "/dev/stdin",
    "/proc/self/mem",
    "/etc/hostname",
    "/nonexistent",
    "builtins:int",
    "os:getcwd",
    "one_cycle(one_cycle())",
    "cosine(",
    "sgd(momentum={[]:1})",
    "__import__('os').system('true')",
]


def texts() -> st.SearchStrategy[str]:
    """Return texts as they may stand in an argument: known trouble, or random characters."""
    random = st.text(st.characters(exclude_characters="\0"), max_size=40)
    return st.sampled_from(_NASTY) | random


def numbers() -> st.SearchStrategy[str]:
    """Return numbers of every size as text."""
    whole = st.integers(-(10**30), 10**30) | st.integers(-2, 100)
    return (whole | st.floats()).map(str)


def json_values() -> st.SearchStrategy[Any]:
    """Return values that JSON can hold, among them surrogates and numbers of any size."""
    leaves = (
        st.none()
        | st.booleans()
        | st.integers(-(10**30), 10**30)
        | st.floats()
        | st.text(max_size=20)
        | st.sampled_from(_NASTY)
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3)
        ),
        max_leaves=6,
    )


def broken_documents() -> st.SearchStrategy[bytes]:
    """Return contents that no program wrote as a document."""
    return st.sampled_from(
        [
            b"",
            b"\0",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"9" * 10_000,
            b"nan",
            b"NaN",
            b"Infinity",
            b'"\\ud800"',
            b"null",
            b"[]",
            b"{}",
            b"0",
            b'"text"',
            b"\n\n\n",
            b"{" * 10 + b"}" * 10,
        ]
    ) | st.binary(max_size=200)


@st.composite
def changed_json(draw: st.DrawFn, document: bytes) -> bytes:
    """Return a JSON document in which one or two values, or keys, are others."""
    try:
        value = json.loads(document)
    except ValueError:
        return draw(changed_bytes(document))
    for _ in range(draw(st.integers(1, 2))):
        value = draw(_changed_value(value))
    return json.dumps(value).encode()


@st.composite
def _changed_value(draw: st.DrawFn, value: Any) -> Any:
    """Return a copy of `value` in which a value somewhere inside is another, or missing."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        name = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 4)) == 0:
            return {key: inner for key, inner in value.items() if key != name}
        return value | {name: draw(_changed_value(value[name]))}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(_changed_value(value[index])), *value[index + 1 :]]
    return draw(json_values())


@dataclass(frozen=True)
class Change:
    """A change of some bytes of a file."""

    start: int
    end: int
    """The bytes from `start` to `end` are replaced."""

    piece: bytes
    """What replaces them."""

    cuts: bool
    """Whether the rest of the file is missing."""

    def __call__(self, content: bytes) -> bytes:
        """Return `content` with this change."""
        return content[: self.start] + self.piece + (b"" if self.cuts else content[self.end :])


@st.composite
def changes(draw: st.DrawFn, length: int) -> Change:
    """Return a change of a file of `length` bytes."""
    start = draw(st.integers(0, max(length - 1, 0)))
    end = draw(st.integers(start, min(start + 20, length)))
    piece = draw(st.binary(max_size=60))
    return Change(start, end, piece, draw(st.integers(0, 9)) == 0)


def changed_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Return `content` with a piece removed, replaced or inserted, or cut off."""
    return changes(len(content)).map(lambda change: change(content))


@st.composite
def changed_lines(draw: st.DrawFn, document: bytes) -> bytes:
    """Return JSON lines in which one line is another, or damaged."""
    lines = document.splitlines(keepends=True)
    if not lines:
        return draw(broken_documents())
    index = draw(st.integers(0, len(lines) - 1))
    line = draw(changed_json(lines[index]) | changed_bytes(lines[index]) | broken_documents())
    return b"".join([*lines[:index], line.rstrip(b"\n") + b"\n", *lines[index + 1 :]])


def yaml_documents() -> st.SearchStrategy[str]:
    """Return YAML documents of settings, most of them with something wrong."""
    names = st.sampled_from(["lr", "batch_size", "epochs", "steps", "schedule", "name", "x", "<<"])
    scalars = st.sampled_from(
        [
            "1",
            ".1",
            "1e-3",
            "!!int x",
            '!!int ""',
            "!!bool maybe",
            "!!timestamp x",
            "!!python/object/apply:os.getcwd []",
            "!!binary x",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "2001-99-99",
            "2001-01-01",
            "12:00:00",
            '"\\U00110000"',
            '"\\ud800"',
            '"\\x1b[2J"',
            "0x" + "f" * 5000,
            "9" * 5000,
            ".nan",
            ".inf",
            "&a [*a]",
            "&a {b: *a}",
            "*missing",
            "[" * 1000,
            "- - - - -",
            "|",
            ">-",
            "? x",
            "'",
            "%YAML 1.2",
            "---",
            "one_cycle()",
        ]
    )
    value = scalars | texts() | numbers()
    lines = st.lists(st.tuples(names, value).map(lambda pair: f"{pair[0]}: {pair[1]}"), max_size=3)
    return lines.map("\n".join) | texts() | st.just(anchor_bomb())


def anchor_bomb() -> str:
    """Return 300 bytes of YAML that name 9 ** 9 strings."""
    text = "lr: [&a0 [x,x,x,x,x,x,x,x,x]"
    for level in range(1, 9):
        text += f", &a{level} [" + ",".join([f"*a{level - 1}"] * 9) + "]"
    return text + "]"
