"""Keys and passwords that the environment holds, kept out of what is written and shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH)S?(_|$)", re.IGNORECASE)
_LEAST = 8
"""A shorter value is no key, and would be found everywhere."""

_IN_ADDRESSES = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]+(?=@)")
"""user:password of scheme://user:password@host."""

_HIDDEN = "[hidden]"


def hidden_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values without texts whose name is that of a key; `max_tokens=4096` is none."""

    def is_key(name: str, value: Any) -> bool:
        return bool(_NAMES.search(name)) and isinstance(value, str) and len(value) >= _LEAST

    return {name: _HIDDEN if is_key(name, value) else value for name, value in values.items()}


def redacted(text: str, env: Mapping[str, str] | None = None) -> str:
    """Return `text` without the values of variables that are named as keys, and URLs' passwords.

    Args:
        text: What is to be written or shown.
        env: The environment; this process's by default.
    """
    env = os.environ if env is None else env
    values = {
        value
        for name, value in env.items()
        if _NAMES.search(name) and len(value) >= _LEAST and not value.startswith("/")
    }
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    return _IN_ADDRESSES.sub(_HIDDEN, text)
