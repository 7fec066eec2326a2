"""Options that say on which nodes a command runs, and how these reach each other.

They come to a command as one argument, `machines`.
"""

from __future__ import annotations

import functools
from typing import Any

import click

from launcher.cli.arguments import (
    MAX_RESTARTS,
    MIN_NODE_TIMEOUT,
    Function,
)
from launcher.cli.machines import MachineOptions
from launcher.cli.values import MAX_NODES, Count, Names, NodeRange, Number


def nodes_options(function: Function) -> Function:
    """Add the options for commands on several nodes."""
    count = click.option(
        "--nodes",
        type=Count(min=1, largest=MAX_NODES),
        metavar="M",
        help="Number of nodes; run this command on each. Default: the number of srun tasks, or 1.",
    )
    return count(_meeting_options(_collecting(function)))


def run_nodes_options(function: Function) -> Function:
    """Add the options for runs on several nodes, which can restart on some of them."""
    count = click.option(
        "--nodes",
        type=NodeRange(),
        metavar="M[:MAX]",
        help="Number of nodes; run this command on each. 2:4 goes on with 2 to 4 after a restart. "
        "Default: the number of srun tasks without --spares, or 1.",
    )
    restarts = click.option(
        "--max-restarts",
        type=Count(min=0, largest=MAX_RESTARTS),
        default=0,
        metavar="N",
        help="If a rank fails, or a node of several is lost, restart from the newest checkpoint, "
        "at most N times.",
    )
    meeting = _meeting_options(_collecting(function))
    return count(spares_option(restarts(node_timeout_option(meeting))))


def spares_option(function: Function) -> Function:
    """Add the option --spares."""
    return click.option(
        "--spares",
        type=Count(min=0, largest=MAX_NODES),
        default=0,
        metavar="K",
        help="With --max-restarts: K further nodes wait to take the place of lost ones.",
    )(function)


def node_timeout_option(function: Function) -> Function:
    """Add the option --node-timeout."""
    return click.option(
        "--node-timeout",
        type=Number(min=MIN_NODE_TIMEOUT, largest=1e6),
        metavar="SECONDS",
        help="How long a node may be silent before it is lost. Default: 20.",
    )(function)


def _meeting_options(function: Function) -> Function:
    """Add the options that say how nodes reach each other."""
    join_timeout = click.option(
        "--join-timeout",
        type=Number(min=0, min_open=True, largest=1e9),
        metavar="SECONDS",
        help="How long the nodes wait for each other. Default: 300; 120 in Slurm jobs.",
    )
    rendezvous = click.option(
        "--rendezvous",
        metavar="HOST[:PORT]",
        help="Address of the first node, where all nodes connect. Not needed in Slurm jobs.",
    )
    hosts = click.option(
        "--hosts",
        type=Names(),
        metavar="A,B...",
        help="Start the run on these hosts through ssh; they connect to the first.",
    )
    ssh = click.option(
        "--ssh",
        metavar="COMMAND",
        help="Command that reaches a host. Default: ssh in batch mode (no prompts).",
    )
    forward = click.option(
        "-x",
        "--forward",
        metavar="NAME[=VALUE]",
        multiple=True,
        help="With --hosts: also pass this environment variable on. May be repeated.",
    )
    return rendezvous(hosts(ssh(forward(join_timeout(function)))))


def _collecting(function: Function) -> Function:
    """Return a function that passes the values of these options on as `machines`."""

    @functools.wraps(function)
    def collect(*arguments: Any, **values: Any) -> Any:
        from launcher.environment.nodes import NodesRequest

        nodes = values.pop("nodes")
        request = NodesRequest(
            count=(nodes, nodes) if isinstance(nodes, int) else nodes,
            rendezvous=values.pop("rendezvous"),
            join_timeout=values.pop("join_timeout"),
            spares=values.pop("spares", 0),
            node_timeout=values.pop("node_timeout", None),
            restarts=values.pop("max_restarts", 0),
        )
        machines = MachineOptions(
            nodes=request,
            hosts=values.pop("hosts"),
            ssh=values.pop("ssh"),
            forward=values.pop("forward"),
        )
        return function(*arguments, machines=machines, **values)

    return collect
