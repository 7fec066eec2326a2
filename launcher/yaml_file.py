"""YAML files of users and run folders, read with limits and without running code from them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import LauncherError, OverrideError
from launcher.printable import printable_line, shortened
from launcher.regular_file import read_regular

if TYPE_CHECKING:
    from yaml import Event, Node

MAX_BYTES = 1 << 20
"""Largest file of settings that is read."""

_MAX_DEPTH = 64
"""Deepest nesting of lists and mappings."""

_BYTES_PER_VALUE = 10
"""A file may hold one value per so many bytes of its largest size, those that aliases repeat
included: nine short lines can ask for billions."""

_MAX_BITS = 64
"""Longest integer; Python refuses to print those with more than 4300 digits."""


_OLD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_.]+)+)")
"""Numbers of YAML 1.1 alone: 010, which is eight there, and 1:30, which is ninety. They stay text,
so that they mean the same as on the command line."""


@dataclass(frozen=True, kw_only=True)
class YAMLFile:
    """The content of a YAML file."""

    value: Any
    """The value; None if the file is empty."""

    lines: Mapping[str, int] = field(default_factory=dict)
    """The line of each key of a mapping, by the key as text, counted from 1."""


def read_yaml_file(
    path: Path,
    *,
    as_text: bool = False,
    max_bytes: int = MAX_BYTES,
    error: type[LauncherError] = OverrideError,
) -> YAMLFile:
    """Return the content of a YAML file.

    Args:
        path: The file.
        as_text: Whether values stay text as written; YAML would read 12:00:00 as 43200.
        max_bytes: Largest size of the file.
        error: The class of the error.

    Raises:
        LauncherError: The file cannot be read, is not a regular file, is not YAML, is nested too
            deep or repeats too much, or gives a key of a mapping twice.
    """
    try:
        content = read_regular(path, max_bytes)
    except OSError as failure:
        reason = (failure.strerror or str(failure)).rstrip(".")
        raise error(f"Cannot read {path}: {reason}.") from None
    try:
        return _parse(content, as_text=as_text, max_values=max_bytes // _BYTES_PER_VALUE)
    except _DamagedError as damage:
        line = "" if damage.line is None else f", line {damage.line}"
        reason = printable_line(shortened(str(damage), 400)).rstrip(".")
        raise error(f"{path}{line}: {reason}.") from None


class _DamagedError(Exception):
    """Text is not YAML that is accepted; `line` is counted from 1, or None if it is unknown."""

    def __init__(self, reason: str, line: int | None) -> None:
        super().__init__(reason)
        self.line = line


def _parse(content: bytes, *, as_text: bool, max_values: int) -> YAMLFile:
    """Return the content of a file as YAML.

    Raises:
        _DamagedError: It is not YAML, or beyond a limit.
    """
    import yaml

    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _DamagedError("not YAML: a byte is not UTF-8", line) from None
    try:
        _check_events(text, max_values)
        loader = _loaders()[as_text](text)
        node = loader.get_single_node()
        lines = _key_lines(node) if isinstance(node, yaml.MappingNode) else {}
        value = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = error.problem or error.context or "the syntax is wrong"
        raise _DamagedError(f"not YAML: {reason}", mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _DamagedError(f"not YAML: {error.reason}", line) from None
    return YAMLFile(value=value, lines=lines)


def _check_events(text: str, max_values: int) -> None:
    """Refuse text that is nested too deep or repeats too much, before anything is built from it.

    Raises:
        _DamagedError: The text is beyond a limit, or no text of UTF-8.
        YAMLError: The text is not YAML.
    """
    import yaml

    counter = _Counter(max_values)
    parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        while parser.check_event():
            counter.add(parser.get_event())
    except (ValueError, OverflowError) as error:  # the parser in Python lets such escapes pass
        line = getattr(parser, "line", None)
        reason = f"not YAML: {error}"
        raise _DamagedError(reason, None if line is None else line + 1) from None


class _Counter:
    """The depth of a document and the number of its values, those that aliases repeat included."""

    def __init__(self, max_values: int) -> None:
        self._max_values = max_values
        self._open: list[tuple[str | None, int]] = []
        self._sizes: dict[str | None, int] = {}
        self._num_values = 0

    def add(self, event: Event) -> None:
        """Count an event.

        Raises:
            _DamagedError: A limit is exceeded, or the event cannot be text.
        """
        import yaml

        line = event.start_mark.line + 1 if event.start_mark is not None else None
        if isinstance(event, yaml.CollectionStartEvent):
            self._open.append((event.anchor, self._num_values))
            self._num_values += 1
            if len(self._open) > _MAX_DEPTH:
                raise _DamagedError(f"values are nested more than {_MAX_DEPTH} deep", line)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self._open.pop()
            self._sizes[anchor] = self._num_values - before
        elif isinstance(event, yaml.ScalarEvent):
            self._num_values += 1
            if not _is_unicode(event.value):
                raise _DamagedError("half of a surrogate pair is not a character", line)
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in self._open):
                raise _DamagedError(f"*{event.anchor} would contain itself", line)
            self._num_values += self._sizes.get(event.anchor, 1)
        if self._num_values > self._max_values:
            raise _DamagedError(f"it stands for more than {self._max_values:,} values", line)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _key_lines(node: Any) -> dict[str, int]:
    """Return the line of each key of a mapping.

    Raises:
        _DamagedError: A key is a list or a mapping, or is given twice.
    """
    import yaml

    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise _DamagedError("a name is a list or a mapping", line)
        if key.value in lines:
            raise _DamagedError(
                f"{key.value} is given again, after line {lines[key.value]}. Keep one", line
            )
        lines[key.value] = line
    return lines


@functools.cache
def _loaders() -> dict[bool, Any]:
    """Return the class that loads YAML, and under True the one that keeps values as text."""
    import yaml

    def construct_object(self: Any, node: Node, deep: bool = False) -> Any:
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and _OLD_NUMBER.fullmatch(str(node.value)):
            return node.value
        try:
            value = super(type(self), self).construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            shown = shortened(str(node.value), 40) if isinstance(node.value, str) else "this value"
            kind = node.tag.rpartition(":")[2]
            why = f" ({error})" if kind == "timestamp" and isinstance(error, ValueError) else ""
            reason = f"{shown!r} cannot be read as {kind}{why}"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from None
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"the integer has more than {_MAX_BITS} bits", node.start_mark
            )
        return value

    values = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    texts = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    methods = {"construct_object": construct_object}
    return {False: type("_Loader", (values,), methods), True: type("_Texts", (texts,), methods)}
