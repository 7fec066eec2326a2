"""The command line, `launcher COMMAND`: one file for each command, imported when it is used."""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Sequence

import click

from launcher.cli.group import LazyGroup
from launcher.cli.standard_streams import open_closed_streams
from launcher.console.colours import colour_setting
from launcher.console.echo import complain, discard_output
from launcher.errors import EXIT_FAILED, EndedError, LauncherError

_COMMANDS = {
    "cancel": "launcher.cli.cancel",
    "check": "launcher.cli.check",
    "completion": "launcher.cli.completion",
    "doctor": "launcher.cli.doctor",
    "export": "launcher.cli.export",
    "find": "launcher.cli.find",
    "logs": "launcher.cli.logs",
    "new": "launcher.cli.new",
    "plan": "launcher.cli.plan",
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
    "tune": "launcher.cli.tune",
    "watch": "launcher.cli.watch",
}
"""The module of each command; it defines a click command called `command`."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    open_closed_streams()
    code = run_command(group, arguments, "launcher")
    gc.freeze()  # a final collection that visits all of torch takes most of a second
    sys.exit(code)


def run_command(
    command: click.Command, arguments: Sequence[str] | None = None, name: str | None = None
) -> int:
    """Run a click command and return its exit code; print an error as one message."""
    try:
        code = command.main(
            None if arguments is None else list(arguments),
            prog_name=name,
            standalone_mode=False,
            color=colour_setting(),
        )
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except EndedError as error:
        return error.exit_code
    except LauncherError as error:
        complain(str(error))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("\nlauncher: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except OSError as error:
        return _end_without_output(error)
    return code if isinstance(code, int) else 0


def _end_without_output(error: OSError) -> int:
    """Return the exit code of a command whose output cannot be written; re-raise other errors."""
    if isinstance(error, BrokenPipeError):
        discard_output()
        return 0
    if error.filename is not None or error.errno not in _NO_ROOM:
        raise error
    complain(f"standard output cannot be written: {error.strerror}.")
    discard_output()
    return EXIT_FAILED
