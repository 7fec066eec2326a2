"""`launcher warm`: the servers from which `launcher run --warm` forks its runs."""

from __future__ import annotations

import time

import click

from launcher.console.echo import echo
from launcher.errors import UsageError


@click.group(short_help="Show or end the servers of `launcher run --warm`.")
def command() -> None:
    """Show or end the servers from which `launcher run --warm` forks its runs.

    A server has imported torch and waits. There is one for each environment of Python and each set
    of environment variables, three at most, and it ends after 10 minutes without a run.
    LAUNCHER_WARM_MINUTES is another number of minutes for servers that start.

    \b
    launcher run digits --warm
    launcher warm status
    launcher warm stop
    """


@command.command()
def status() -> None:
    """Show the warm servers of this user."""
    from launcher.console.tables import table
    from launcher.quantities import size
    from launcher.warm.running_servers import find_servers
    from launcher.warm.socket_folder import ForeignFolderError

    try:
        servers = find_servers()
    except ForeignFolderError as error:
        raise UsageError(_foreign(error)) from None
    if not servers:
        echo("There is no warm server. `launcher run RECIPE --warm` starts one.")
        return
    now = time.time()
    cells = [["process", "python", "commands", "memory", "ends in"]]
    for server in servers:
        remaining = server.idle_minutes - (now - server.used) / 60
        ends = f"{max(remaining, 0):.0f} min" if server.num_commands == 0 else ""
        count = f"{server.num_commands}"
        memory = size(server.memory_bytes)
        cells.append([str(server.pid), server.prefix, count, memory, ends])
    echo("\n".join(table(cells)))


@command.command()
def stop() -> None:
    """End the warm servers of this user; runs that they have started go on."""
    from launcher.warm.running_servers import stop_servers
    from launcher.warm.socket_folder import ForeignFolderError

    try:
        count = stop_servers()
    except ForeignFolderError as error:
        raise UsageError(_foreign(error)) from None
    ended = "1 warm server has ended." if count == 1 else f"{count} warm servers have ended."
    echo(ended if count else "There is no warm server.")


def _foreign(error: Exception) -> str:
    return (
        f"Warm servers cannot be used: {error}. Remove it, or set XDG_RUNTIME_DIR to a folder of "
        "this user."
    )
