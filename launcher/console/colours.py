"""Colours, on terminals alone, and not where NO_COLOR is set (https://no-color.org)."""

from __future__ import annotations

import os

import click


def allowed() -> bool | None:
    """Return False where colours are not wanted; None leaves it to whether there is a terminal."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


def painted(line: str, state: str) -> str:
    """Return a line of a table with the state in it in its colour."""
    from launcher.runs.status import COLOURS

    return line.replace(f"  {state}", f"  {click.style(state, fg=COLOURS[state])}", 1)
