"""The machines of a run, as the options of a command name them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError
from launcher.printable import printable_line

_OF_THIS_MACHINE = (
    *("--hosts", "--ssh", "--nodes", "--spares", "--rendezvous", "--forward", "-x"),
)
"""Options of which the commands on the hosts know nothing."""

_FLAGS = "q"
"""Letters of the options without a value that may stand before another letter."""

if TYPE_CHECKING:
    from launcher.environment.nodes import Nodes, NodesRequest


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """What the options of a command say about the machines that it runs on."""

    nodes: NodesRequest
    """The nodes, and where they meet."""

    hosts: tuple[str, ...] | None
    """The hosts that the command is started on through ssh; None is this machine."""

    ssh: str | None
    """The command that reaches a host; None is the default."""

    forward: tuple[str, ...]
    """Variables for the hosts, as NAME or NAME=VALUE."""

    def find(self) -> Nodes | None:
        """Return the machines of the run; None is this machine alone.

        Raises:
            UsageError: The options contradict each other.
            WorldError: Slurm did not start one launcher on each node.
        """
        from launcher.environment.nodes import find_nodes, nodes_of_hosts

        if self.hosts is None:
            return find_nodes(self.nodes)
        return nodes_of_hosts(self.hosts, self.nodes)

    def variables(self) -> dict[str, str]:
        """Return the variables for the hosts that `--forward` and DeepSpeed's files name.

        Lines of the files that are left out are named on standard error.

        Raises:
            UsageError: There are no other hosts, or a variable cannot be passed on.
        """
        from launcher.launch.forwarded_variables import named_variables, variables_in_files

        if self.hosts is None:
            if self.forward:
                name = printable_line(self.forward[0].partition("=")[0])
                raise UsageError(
                    f"--forward {name} passes a variable on to the hosts of --hosts: add --hosts, "
                    "or leave it out, because ranks on this machine have all variables of this "
                    "terminal."
                )
            return {}
        named = named_variables(self.forward, os.environ)
        home = Path(os.path.expanduser("~"))  # noqa: PTH111  # Path.home() raises without a home

        def warn(text: str) -> None:
            print(f"launcher: {text}", file=sys.stderr)

        return variables_in_files(os.environ, home, Path.cwd(), warn) | named

    def start_on_hosts(self, hosts: tuple[str, ...], variables: Mapping[str, str]) -> int:
        """Run the command of this process on each of `hosts`; return the exit code of the run."""
        from launcher.launch.ssh import run_on_hosts

        arguments = remove_options(sys.argv[1:], _OF_THIS_MACHINE)
        return run_on_hosts(
            hosts, arguments, Path.cwd(), self.nodes, ssh=self.ssh, variables=variables
        )


def remove_options(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return command-line arguments without some options and their values.

    Args:
        arguments: The arguments.
        options: The options. One of a single letter may be written with its value (`-xNAME`) and
            behind flags (`-qx NAME`), which remain.
    """
    letters = "".join(option[1] for option in options if len(option) == 2)
    short = re.compile(rf"(-[{_FLAGS}]*)[{letters}](.*)" if letters else r"(?!)", re.DOTALL)
    remaining = []
    iterator = iter(arguments)
    for argument in iterator:
        if argument in options:
            next(iterator, None)
        elif joined := short.match(argument):
            remaining += [joined[1]] if len(joined[1]) > 1 else []
            if not joined[2]:
                next(iterator, None)
        elif argument.partition("=")[0] not in options:
            remaining.append(argument)
    return remaining
