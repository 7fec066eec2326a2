"""Colours for terminals, off where NO_COLOR is set (https://no-color.org) or TERM is `dumb`."""

from __future__ import annotations

import os

import click


def colour_setting() -> bool | None:
    """Return False if the environment forbids colours, else None: click asks the terminal."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


def colour_state(line: str, state: str) -> str:
    """Return a line of a table of runs with the state of its run in colour.

    Args:
        line: The line. The state stands in it behind two spaces.
        state: One of `launcher.runs.status.STATES`.
    """
    from launcher.runs.status import COLOURS

    return line.replace(f"  {state}", f"  {click.style(state, fg=COLOURS[state])}", 1)
