"""Whether a command shall be forked from a warm server, and which modules that server imports."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

WARM_VARIABLE = "LAUNCHER_WARM"
"""Environment variable: 1 forks the commands that train from a warm server."""

_COMMANDS = frozenset({"find", "prove", "resume", "run", "sweep", "tune"})
"""The commands that train."""

_IN_THIS_PROCESS = frozenset({"-h", "--help", "--debug", "--pdb", "--hosts", "--nodes"})
"""Options with which a command stays where it was started."""

_MODULES = (
    "launcher.cli.run",
    "launcher.cli.resume",
    "launcher.cli.prove",
    "launcher.checks.proof",
    "launcher.engine.probes.parity",
    "launcher.launch.debug_session",
    "launcher.launch.session",
    "launcher.recipe.resolve",
    "launcher.report.write",
    "launcher.console.failure",
    "rich.console",
    "rich.progress",
    "rich.live",
)


def wants_warm(arguments: Sequence[str]) -> bool:
    """Return whether a command line, or the environment, asks for a warm start."""
    if not arguments or arguments[0] not in _COMMANDS:
        return False
    options = {each.partition("=")[0] for each in arguments if each.startswith("-")}
    if options & _IN_THIS_PROCESS or "--no-warm" in options:
        return False
    return "--warm" in options or os.environ.get(WARM_VARIABLE) == "1"


def run_in_warm_process(arguments: Sequence[str]) -> int | None:
    """Run a command in a fork of a warm server; return its exit code, or None if it must run here.

    If a signal ended the command, this process ends by the same one.
    """
    from launcher.warm.client import end_like, run_warm

    code = run_warm(arguments, _say)
    return None if code is None else end_like(code)


def serve_commands(name: str, ready: str) -> list[str]:
    """Be a warm server until it is idle; return the arguments of a command in each of its forks.

    Args:
        name: The identity of the server.
        ready: Number of the pipe that receives whether it listens.
    """
    from launcher.launch.launcher import import_for_any
    from launcher.warm.server import serve

    return serve(name, int(ready), _MODULES, import_for_any)


def _say(text: str) -> None:
    from launcher.console.echo import complain

    sys.stdout.flush()
    complain(text)
