"""What commands print: escaped where it could command a terminal, and never the cause of a failure.

Commands print through this module alone; a lint rule forbids `click.echo` elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import TextIO

import click

from launcher.console.colours import colour_setting
from launcher.printable import printable, shortened

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, or a file behind a stream, that takes no more."""


def echo(
    text: str = "",
    *,
    err: bool = False,
    newline: bool = True,
    exact: bool = False,
    keep: str = "",
    style: Callable[[str], str] = str,
) -> None:
    """Print text on standard output or standard error, with control characters as escapes.

    Names of files and the text of exceptions may hold characters that clear a screen or reorder a
    line. Characters that the encoding of the stream lacks are written as escapes as well.

    Args:
        text: The text.
        err: Whether to print on standard error.
        newline: Whether a newline follows.
        exact: Whether to print the text unchanged if the stream is not a terminal: it is a file
            or a script that other programs read.
        keep: Control characters to print as they are.
        style: Adds colours to the escaped text, which `click` removes where no terminal shows them.

    Raises:
        OSError: The stream cannot be written.
    """
    stream = sys.stderr if err else sys.stdout
    if not (exact and not stream.isatty()):
        text = printable(text, keep)
    click.echo(_encodable(style(text), stream), nl=newline, err=err, color=colour_setting())


def echo_if_possible(text: str) -> None:
    """Print a line; if standard output is closed or full, discard it and all later output."""
    try:
        echo(text)
    except BrokenPipeError:
        discard_output()
    except OSError as error:
        discard_output()
        complain(f"standard output cannot be written ({error.strerror}); the run continues.")


def complain(text: str) -> None:
    """Print an error message on standard error, if that can be written."""

    def with_name(escaped: str) -> str:
        return f"{click.style('launcher:', fg='red', bold=True)} {escaped}"

    with contextlib.suppress(OSError, ValueError):
        echo(shortened(text), err=True, style=with_name)


def discard_output() -> None:
    """Send all later standard output to /dev/null: its reader, such as `head`, has closed it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _encodable(text: str, stream: TextIO) -> str:
    """Return text that the encoding of a stream has, with escapes for what it lacks."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
