"""The machines of a run, from the options of `launcher run` and `launcher resume`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError

if TYPE_CHECKING:
    from launcher.environment.nodes import Nodes


def find_machines(
    hosts: tuple[str, ...] | None,
    count: int | None,
    rendezvous: str | None,
    join_timeout: float | None,
) -> Nodes | None:
    """Return the machines of the run; None is this machine alone.

    Raises:
        UsageError: The options contradict each other.
        WorldError: Slurm did not start one launcher on each node.
    """
    from launcher.environment.nodes import find_nodes, nodes_of_hosts

    if hosts is None:
        return find_nodes(count, rendezvous, join_timeout)
    if count not in (None, len(hosts)):
        raise UsageError(f"--nodes {count} contradicts --hosts, which names {len(hosts)}.")
    return nodes_of_hosts(hosts, rendezvous)


def start_on_hosts(hosts: tuple[str, ...], rendezvous: str | None, ssh: str | None) -> int:
    """Run the command of this process on each of `hosts`; return the exit code of the run."""
    from launcher.launch.ssh import run_on_hosts

    arguments = remove_options(sys.argv[1:], ("--hosts", "--ssh", "--nodes", "--rendezvous"))
    return run_on_hosts(hosts, arguments, Path.cwd(), rendezvous=rendezvous, ssh=ssh)


def remove_options(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return command-line arguments without some options and their values."""
    remaining = []
    iterator = iter(arguments)
    for argument in iterator:
        if argument in options:
            next(iterator, None)
        elif argument.partition("=")[0] not in options:
            remaining.append(argument)
    return remaining
