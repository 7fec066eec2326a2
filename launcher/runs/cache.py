"""The user's cache: folders for measurements and look-ups that later commands reuse."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return the user's cache folder for one kind of value, which may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "launcher" / kind
