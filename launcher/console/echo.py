"""Output of commands that must not fail because nobody reads it."""

from __future__ import annotations

import contextlib
import os
import sys

import click

from launcher.console.colours import colour_setting


def echo_if_possible(text: str) -> None:
    """Print a line; if standard output is closed or full, discard it and all later output."""
    try:
        click.echo(text)
    except BrokenPipeError:
        discard_output()
    except OSError as error:
        discard_output()
        complain(f"standard output cannot be written ({error.strerror}); the run continues.")


def complain(text: str) -> None:
    """Print an error message on standard error, if that can be written."""
    head = click.style("launcher:", fg="red", bold=True)
    with contextlib.suppress(OSError):
        click.echo(f"{head} {text}", err=True, color=colour_setting())


def discard_output() -> None:
    """Send all later standard output to /dev/null: its reader, such as `head`, has closed it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
