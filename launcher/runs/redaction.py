"""Keep keys and passwords of the environment out of everything that is written or shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH)S?(_|$)", re.IGNORECASE)
_MIN_LENGTH = 8
"""Shorter values are not keys, and replacing them would garble unrelated text."""

_IN_ADDRESSES = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]+(?=@)")
"""The `user:password` in scheme://user:password@host."""

_HIDDEN = "[hidden]"


def hidden_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with every key or password replaced by `[hidden]`.

    A value is replaced if its name looks like that of a key, and it is a text of 8 characters or
    more: `max_tokens=4096` stays.
    """

    def is_key(name: str, value: Any) -> bool:
        return bool(_NAMES.search(name)) and isinstance(value, str) and len(value) >= _MIN_LENGTH

    return {name: _HIDDEN if is_key(name, value) else value for name, value in values.items()}


def is_secret(name: str, value: str) -> bool:
    """Return whether a variable holds a key, a password or an address with credentials."""
    return bool(_NAMES.search(name) or _IN_ADDRESSES.search(value))


def redacted(text: str, env: Mapping[str, str] | None = None) -> str:
    """Return `text` with keys, and the credentials in URLs, replaced by `[hidden]`.

    Keys are the values of environment variables whose names look like those of keys; values that
    begin with a slash are paths and stay.

    Args:
        text: Text that will be written or shown.
        env: The environment; by default that of this process.
    """
    env = os.environ if env is None else env
    values = {
        value
        for name, value in env.items()
        if _NAMES.search(name) and len(value) >= _MIN_LENGTH and not value.startswith("/")
    }
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    return _IN_ADDRESSES.sub(_HIDDEN, text)
