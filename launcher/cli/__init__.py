"""The command line, `launcher COMMAND`: one file for each command, imported when it is used."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from launcher.cli.group import LazyGroup
from launcher.cli.standard_streams import prepare_streams
from launcher.cli.warm_start import run_in_warm_process, wants_warm
from launcher.console.colours import colour_setting
from launcher.console.echo import NO_ROOM, complain, discard_output, echo
from launcher.errors import EXIT_FAILED, EXIT_USAGE, EndedError, LauncherError
from launcher.interrupted_start import STOPPED, raise_when_interrupted
from launcher.printable import error_line, traceback_of
from launcher.signals import EXIT_BY_SIGNAL, exit_process

_COMMANDS = {
    "cancel": "launcher.cli.cancel",
    "check": "launcher.cli.check",
    "completion": "launcher.cli.completion",
    "doctor": "launcher.cli.doctor",
    "download": "launcher.cli.download",
    "evaluate": "launcher.cli.evaluate",
    "export": "launcher.cli.export",
    "find": "launcher.cli.find",
    "logs": "launcher.cli.logs",
    "new": "launcher.cli.new",
    "plan": "launcher.cli.plan",
    "predict": "launcher.cli.predict",
    "profile": "launcher.cli.profile",
    "prove": "launcher.cli.prove",
    "recipes": "launcher.cli.recipes",
    "report": "launcher.cli.report",
    "resume": "launcher.cli.resume",
    "run": "launcher.cli.run",
    "runs": "launcher.cli.runs",
    "settings": "launcher.cli.settings",
    "status": "launcher.cli.status",
    "submit": "launcher.cli.submit",
    "sweep": "launcher.cli.sweep",
    "tune": "launcher.cli.tune",
    "warm": "launcher.cli.warm",
    "watch": "launcher.cli.watch",
}
"""The module of each command; it defines a click command called `command`."""

_COMPLETION_VARIABLE = "_LAUNCHER_COMPLETE"
"""Set by the scripts of `launcher completion` when a shell asks for completions."""


@click.group(
    cls=LazyGroup, modules=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="gpu-launcher", prog_name="launcher")
def group() -> None:
    """Train a recipe with the same optimizer steps on any number of GPUs.

    \b
    launcher plan digits              show every number of a run before it starts
    launcher run digits               train on all GPUs of this machine
    launcher run digits -n 2 lr=0.2   train on two, with another learning rate
    launcher report runs/digits-...   write an HTML page about a run
    """


def main(arguments: Sequence[str] | None = None, *, starts_warm: bool = True) -> None:
    """Run the command line and end the process with its exit code.

    Args:
        arguments: The arguments; None takes those of this process.
        starts_warm: Whether a command that asks for it is forked from a warm server.
    """
    prepare_streams()
    if instruction := os.environ.get(_COMPLETION_VARIABLE):
        sys.exit(_complete(instruction))
    arguments = sys.argv[1:] if arguments is None else arguments
    if starts_warm and wants_warm(arguments):
        raise_when_interrupted()
        code = run_in_warm_process(arguments)
        if code is not None:
            exit_process(code)
    code = run_command(group, arguments, "launcher")
    gc.freeze()  # a final collection that visits all of torch takes most of a second
    exit_process(_flush(code))


def run_command(
    command: click.Command, arguments: Sequence[str] | None = None, name: str | None = None
) -> int:
    """Run a click command and return its exit code; print an error as one message.

    An exception that is not an error of the user, of the system or of a run is a bug of this
    package, and is shown with its traceback.
    """
    try:
        return _invoke(command, arguments, name)
    except click.ClickException as error:
        _show_click_error(error)
        return error.exit_code
    except LauncherError as error:
        if not isinstance(error, EndedError):
            complain(str(error))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        with contextlib.suppress(OSError, ValueError):
            echo(f"\n{STOPPED}", err=True)
        return EXIT_BY_SIGNAL + signal.SIGINT
    except OSError as error:
        return _end_by_os_error(error)
    except Exception as error:  # noqa: BLE001  # it must not look like anything else
        return _end_by_unexpected_error(error)


def _invoke(command: click.Command, arguments: Sequence[str] | None, name: str | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    name = Path(sys.argv[0]).name if name is None else name
    try:
        with command.make_context(name, list(arguments), color=colour_setting()) as context:
            code: Any = command.invoke(context)
    except click.exceptions.Exit as end:  # raised after --help and --version
        return end.exit_code
    return code if isinstance(code, int) else 0


def _complete(instruction: str) -> int:
    """Print completions for a shell; an error prints nothing, because the user is typing."""
    from click.shell_completion import shell_complete

    try:
        return shell_complete(group, {}, "launcher", _COMPLETION_VARIABLE, instruction)
    except Exception:  # noqa: BLE001  # whatever a folder or a recipe holds
        return EXIT_FAILED


def _flush(code: int) -> int:
    """Write out what standard output still holds; return the exit code of the process."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        return code or (_end_by_os_error(error) if isinstance(error, OSError) else EXIT_FAILED)
    return code


def _show_click_error(error: click.ClickException) -> None:
    """Print an error about arguments, which may hold any characters."""
    text = io.StringIO()
    error.show(file=text)
    with contextlib.suppress(OSError, ValueError):
        echo(text.getvalue(), err=True, newline=False)


def _end_by_os_error(error: OSError) -> int:
    """Report an error of the system, for example of a file or of standard output.

    Returns:
        The exit code: 0 if the reader of standard output has closed it, as `head` does.
    """
    if isinstance(error, BrokenPipeError):
        discard_output()
        return 0
    if error.filename is not None:
        complain(f"{os.fsdecode(str(error.filename))}: {error.strerror or error}.")
        return EXIT_USAGE
    if error.errno in NO_ROOM:
        discard_output()
        complain(f"standard output cannot be written: {error.strerror}.")
        return EXIT_FAILED
    return _end_by_unexpected_error(error)


def _end_by_unexpected_error(error: Exception) -> int:
    """Report an exception that nothing expected; return the exit code."""
    if isinstance(error, RecursionError):
        complain("A file or a value is nested too deeply to be read.")
        return EXIT_USAGE
    if isinstance(error, MemoryError):
        complain("Memory ran out.")
        return EXIT_FAILED
    with contextlib.suppress(OSError, ValueError):
        echo(traceback_of(error), err=True, newline=False)
    complain(
        f"An unexpected error, which is a bug of launcher: {error_line(error)}. Please report it "
        "with the traceback above, the command and its recipe."
    )
    return EXIT_FAILED
